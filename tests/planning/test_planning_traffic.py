"""Bytes of a step by the papers' formulas, with numbers that can be followed by hand; what is sent is measured in
tests/distributed/test_traffic.py."""

from __future__ import annotations

import dataclasses

import pytest

from t2i.planning.config import ClusterConfig
from t2i.planning.memory import STRATEGIES, Trained
from t2i.planning.traffic import Traffic, traffic

CLUSTER = ClusterConfig("A", 100.0, 80.0, 8, 4, 80.0, 2.0, 32, 0.5)
# 1,000 parameters, 800 of them in blocks: 4,000 bytes of gradients, 2,000 of weights in 16 bits.
TRAINED = Trained(1_000, 0, 0, 0, 2_000, 1_600, 200)


def test_each_strategy_by_hand():
    found = {strategy: traffic(TRAINED, strategy, CLUSTER) for strategy in STRATEGIES}
    ring, within = 31 / 32, 7 / 8
    assert found["ddp"] == Traffic(0, 2 * ring * 4_000, 0, 2 * ring * 4_000)
    assert found["shard_grad_op"] == Traffic(ring * 2_000, ring * 4_000, 0, ring * 6_000)
    assert found["full_shard"] == Traffic(ring * 3_600, ring * 4_000, 0, ring * 7_600)
    among = 2 * 3 / 4 * 4_000
    hybrid = found["hybrid_shard"]
    assert hybrid.weights == pytest.approx(within * 3_600)
    assert hybrid.gradients == pytest.approx(within * 4_000 + among / 8)
    assert hybrid.node == pytest.approx(among)
    assert hybrid.gpu == hybrid.weights + hybrid.gradients


def test_zero_sends_one_and_a_half_times_what_data_parallelism_does():
    """ZeRO, 1910.02054, section 7.2.2: 3 times the parameters in place of 2, where both have so many bytes."""
    all_in_blocks = dataclasses.replace(TRAINED, gathered=4_000, in_blocks=4_000)
    sharded, whole = (traffic(all_in_blocks, each, CLUSTER) for each in ("full_shard", "ddp"))
    assert sharded.gpu == pytest.approx(1.5 * whole.gpu)


def test_weights_are_gathered_for_each_micro_batch_and_gradients_summed_up_once():
    one, three = (traffic(TRAINED, "full_shard", CLUSTER, parts) for parts in (1, 3))
    assert three.weights == 3 * one.weights
    assert three.gradients == one.gradients
    assert traffic(TRAINED, "ddp", CLUSTER, 3) == traffic(TRAINED, "ddp", CLUSTER)


def test_nothing_leaves_a_machine_that_is_alone():
    alone = dataclasses.replace(CLUSTER, nodes=1)
    assert [traffic(TRAINED, strategy, alone).node for strategy in STRATEGIES] == [0, 0, 0, 0]
    assert traffic(TRAINED, "hybrid_shard", alone) == traffic(TRAINED, "full_shard", alone)
    single = dataclasses.replace(alone, gpus_per_node=1)
    assert [traffic(TRAINED, strategy, single).gpu for strategy in STRATEGIES] == [0, 0, 0, 0]


def test_gloo_scatters_by_a_whole_all_reduce():
    by_gloo = traffic(TRAINED, "full_shard", dataclasses.replace(CLUSTER, gpu="none"))
    assert by_gloo.gradients == 2 * traffic(TRAINED, "full_shard", CLUSTER).gradients


def test_muon_sends_whole_matrices_to_those_that_have_others():
    """500 of the numbers are in its matrices: in 16 bits where all get all of them; where each holds a share, its share
    goes there in 32 bits and comes back in 16."""
    muon = dataclasses.replace(TRAINED, muon=500)
    assert traffic(muon, "ddp", CLUSTER).muon == 31 / 32 * 1_000
    assert traffic(muon, "full_shard", CLUSTER).muon == pytest.approx(31 / 32 * 6 * 500 / 32)
