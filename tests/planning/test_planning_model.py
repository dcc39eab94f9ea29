"""What is counted of one network of a plan, by what the family says of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2i.planned import PlannedNetwork
from t2i.planning.count import Flops
from t2i.planning.model import NONE, Model, counted, frozen_weight_bytes

WIDTH, HIDDEN = 16, 64
PARAMETERS = 2 * WIDTH * HIDDEN


@pytest.fixture(scope="module")
def config(compose_run):
    return compose_run(
        "experiment=pixel_diffusion/tiny_flow_dit",
        "trainer.precision=bf16-mixed",
        "optimizer.muon_scale=10.0",
    )


def planned(requires_grad=False, trained=False, **given) -> PlannedNetwork:
    with torch.device("meta"):
        bias = {"bias": False}
        module = nn.Sequential(nn.Linear(WIDTH, HIDDEN, **bias), nn.ReLU(), nn.Linear(HIDDEN, WIDTH, **bias))

    def inputs(batch):
        return {"input": torch.empty(batch, WIDTH, requires_grad=requires_grad)}

    return PlannedNetwork("network", module.requires_grad_(trained), inputs, trained, **given)


def test_a_trained_network(config):
    """No gradient of its input is wanted: the backward pass leaves the first layer's out."""
    network = planned(trained=True)
    part = counted(network, config, "cpu")
    assert part.flops == Flops(2 * PARAMETERS, 2 * PARAMETERS + PARAMETERS)
    assert (part.parameters, part.averaged, part.muon) == (PARAMETERS, PARAMETERS, 0)
    assert part.activations.per_image > 0
    assert part.peak_per_image == 0
    hidden = counted(planned(trained=True, hidden=[network.module[0].weight]), config, "cpu")
    assert hidden.muon == PARAMETERS // 2
    assert counted(planned(trained=True, averaged=False), config, "cpu").averaged == 0


def test_a_frozen_network(config):
    part = counted(planned(), config, "cpu")
    assert part.flops == Flops(2 * PARAMETERS)
    assert part.activations == NONE
    assert part.peak_per_image >= 2 * (WIDTH + HIDDEN)
    assert part.averaged == 0


def test_a_frozen_network_that_gradients_go_through(config):
    part = counted(planned(requires_grad=True), config, "cpu")
    assert part.flops == Flops(2 * PARAMETERS, 2 * PARAMETERS)
    assert part.activations.per_image > 0
    assert part.peak_per_image == 0


def test_calls_cost_as_often(config):
    once, thrice = (counted(planned(trained=True, calls_per_image=n), config, "cpu") for n in (1, 3))
    assert thrice.flops == Flops(3 * once.flops.forward, 3 * once.flops.backward)
    assert thrice.activations.per_image == 3 * once.activations.per_image
    assert thrice.activations.fixed == once.activations.fixed  # 16-bit copies of the weights
    assert thrice.parameters == once.parameters


def test_what_training_does_not_run_takes_the_memory_of_its_weights_alone(config):
    idle = counted(planned(calls_per_image=0), config, "cpu")
    assert (idle.flops, idle.activations, idle.peak_per_image) == (None, NONE, 0)
    model = Model((counted(planned(trained=True), config, "cpu"), idle))
    assert model.trained().frozen_bytes == 4 * PARAMETERS


def test_frozen_networks_run_one_after_another(config):
    one, other = counted(planned(), config, "cpu"), counted(planned(cached_as="text"), config, "cpu")
    trained = counted(planned(trained=True), config, "cpu")
    model = Model((trained, one, other))
    assert model.frozen_peak_per_image() == one.peak_per_image
    assert model.cacheable == {"text"}
    assert model.trained({"text"}).frozen_bytes == model.trained().frozen_bytes - 4 * PARAMETERS
    alone = Model((trained, other))
    assert alone.frozen_peak_per_image() == other.peak_per_image > 0
    assert alone.frozen_peak_per_image({"text"}) == 0


@pytest.mark.parametrize(
    ("precision", "device", "online", "read"),
    # A copy in bf16 works, unless it is read what that would make; what the run saves is there whole in any case.
    [
        ("bf16-mixed", "cuda", 4 + 2 + 2, 4 + 2),
        ("16-mixed", "cuda", 4 + 4, 4 + 4),
        ("bf16-mixed", "cpu", 4 + 4, 4 + 4),
    ],
)
def test_frozen_weights_take_what_they_work_in(config, precision, device, online, read):
    networks = (planned(cached_as="latents", saved=True, copied=True), planned(trained=True), planned())
    parts = tuple(counted(network, config, "cpu") for network in networks)
    model = Model(parts, frozen_weight_bytes(precision, device))
    assert model.trained().frozen_bytes == online * PARAMETERS
    assert model.trained({"latents"}).frozen_bytes == read * PARAMETERS
    alone = Model(
        (counted(planned(saved=True), config, "cpu"), parts[1]), frozen_weight_bytes(precision, device)
    )
    assert alone.trained().frozen_bytes == 4 * PARAMETERS  # what is saved works itself
