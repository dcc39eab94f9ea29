"""Planned memory against what torch's own tracker sees while a model is really trained on the CPU.

The tracker (torch.distributed._tools.mem_tracker) watches every tensor that is made and freed.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule

from t2i.config import EMAConfig, OptimizerConfig, TrainerConfig
from t2i.families.latent_diffusion.config import UNetDenoiserConfig
from t2i.families.latent_diffusion.model import build_denoiser
from t2i.nn.blocks import blocks_of
from t2i.nn.dit_config import DiTConfig
from t2i.planned import PlannedNetwork
from t2i.planning.count import Activations, activations, num_parameters, peak_bytes_per_image
from t2i.planning.memory import STRATEGIES, Memory, Trained, memory
from t2i.planning.model import sharded
from t2i.training.blocks import prepare
from t2i.training.divided import own
from t2i.training.ema import EMA
from t2i.training.optimizer import build_optimizer
from t2i.training.strategy import divide, mesh_of

CPU = torch.device("cpu")
WIDTH = 64  # of tokens and of the pooled vector
MODELS = {
    "tiny UNet": UNetDenoiserConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_heads=2,
        use_linear_in_transformer=False,
    ),
    "UNet": UNetDenoiserConfig(
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1,),
        num_heads=4,
        use_linear_in_transformer=False,
    ),
    "DiT": DiTConfig("dit", patch_size=2, width=192, depth=4, heads=6),
    "DiT with convolutions": DiTConfig("dit", patch_size=4, width=128, depth=4, heads=4, refiner_depth=2),
}


def inputs_for(config):
    def inputs(batch):
        given = {
            "x": torch.empty(batch, 4, 16, 16),
            "t": torch.empty(batch),
            "context": torch.empty(batch, 24, WIDTH),
            "pooled": torch.empty(batch, WIDTH),
        }
        if isinstance(config, UNetDenoiserConfig):
            del given["pooled"]
        return given

    return inputs


def planned(config, batch, precision, checkpointing, muon_scale, compiled=False) -> Memory:
    with torch.device("meta"):
        network = build_denoiser(config, 4, WIDTH, WIDTH)
    count = num_parameters(network)
    hidden = network.hidden_matrices() if muon_scale is not None else []
    trained = Trained(
        parameters=count,
        muon=sum(p.numel() for p in hidden),
        averaged=count,
        frozen_bytes=0,
        gathered=0,
        in_blocks=0,
        largest_block=0,
    )
    kept = activations(network, inputs_for(config), precision, "cpu", compiled)
    return memory(trained, kept, 0, batch, "ddp", checkpointing, num_gpus=1, gpus_per_node=1)


def trained_for_real(config, batch, precision, checkpointing, muon_scale, compiled=False) -> int:
    """The most bytes at a time during the second of two steps, in Lightning's order."""
    network = build_denoiser(config, 4, WIDTH, WIDTH)
    prepare(blocks_of(network), checkpointing, compiled)
    optimizer = build_optimizer(
        [network.parameters()],
        network.hidden_matrices(),
        OptimizerConfig(learning_rate=1e-4, muon_scale=muon_scale, warmup_images=0),
    )
    ema = EMA(dict(network.named_parameters()), EMAConfig(half_life_images=1_000, rampup_ratio=0.05))

    def step() -> None:
        batch_of = {name: torch.rand_like(value) for name, value in inputs_for(config)(batch).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            loss = network(**batch_of).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(batch, batch)

    step()
    tracker = MemTracker()
    tracker.track_external(network, optimizer, *ema.average.values())
    with tracker:
        step()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "UNet" else name for name in MODELS]
)
def test_memory_of_training(name, precision, checkpointing):
    case = (MODELS[name], 8, precision, checkpointing, None)
    assert planned(*case).total == pytest.approx(trained_for_real(*case), rel=0.15)


def test_memory_with_muon():
    """Muon keeps one moment where AdamW keeps two. It also frees its gradients, which a plan still counts."""
    config = MODELS["DiT"]
    adamw, muon = (planned(config, 8, "32-true", False, scale) for scale in (None, 10.0))
    assert muon.optimizer < 0.75 * adamw.optimizer
    assert muon.total == pytest.approx(trained_for_real(config, 8, "32-true", False, 10.0), rel=0.15)


@pytest.mark.parametrize(
    ("name", "checkpointing", "compiled", "within"),
    [
        ("DiT", False, False, 0.15),
        ("DiT", True, False, 0.15),
        ("tiny UNet", True, True, 0.05),
    ],
)
def test_activations_grow_as_planned(monkeypatch, name, checkpointing, compiled, within):
    """The part that the batch decides alone, where the whole could hide an error. Compiled blocks are run again whole;
    what their kernels save is not planned, so that none are made here."""
    monkeypatch.setattr(torch, "compile", lambda forward: forward)
    config, ways = MODELS[name], ("32-true", checkpointing, None, compiled)
    few, many = (trained_for_real(config, batch, *ways) for batch in (6, 18))
    per_image = planned(config, 1, *ways).activations
    print(12 * per_image / (many - few))
    assert 12 * per_image == pytest.approx(many - few, rel=within)


def test_what_has_buffers_is_not_run_again():
    """As batch norm, which would count each picture twice."""

    def kept(*layers):
        blocks = [torch.nn.Sequential(*layers, torch.nn.GELU()) for _ in range(2)]
        network = torch.nn.Sequential(torch.nn.Linear(8, 8), *blocks).to("meta")

        def inputs(batch):
            return {"input": torch.empty(batch, 8)}

        return activations(network, inputs, "32-true", "cpu").per_image_checkpointed

    row = 8 * 4  # bytes: what a linear layer, GELU and batch norm each are given
    assert kept() == 3 * row + row  # each block's inputs, and what one keeps
    assert kept(torch.nn.BatchNorm1d(8)) == row + row + 4 * row


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_memory_of_a_frozen_encoder(precision):
    from t2i.families.autoencoder.model import Encoder
    from t2i.families.autoencoder.model_config import EncoderDecoderConfig

    config, shape = (
        EncoderDecoderConfig(
            base_channels=32,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_resolutions=(),
            resolution_px=256,
            latent_channels=4,
        ),
        (3, 128, 128),
    )
    with torch.device("meta"):
        planned_for = Encoder(config, 8)
    encoder, image = Encoder(config, 8), torch.rand(3, *shape)
    tracker = MemTracker()
    tracker.track_external(encoder)
    with tracker, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        encoder(image)
    alive = tracker.get_tracker_snapshot("peak")[CPU]["Total"] - 4 * num_parameters(encoder)

    def inputs(batch):
        return {"image": torch.empty(batch, *shape)}

    assert 3 * peak_bytes_per_image(planned_for, inputs, precision, "cpu") == pytest.approx(alive, rel=0.15)


def test_a_gpu_computes_norms_in_float32():
    """CUDA's autocast, followed without a GPU: what its group norms keep is twice as large as on a CPU."""
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 64, 3, padding=1), torch.nn.GroupNorm(32, 64))

    def inputs(batch):
        return {"input": torch.empty(batch, 4, 16, 16)}

    on = {device: activations(network, inputs, "bf16-mixed", device).per_image for device in ("cpu", "cuda")}
    map_bytes, image_bytes = 64 * 16 * 16 * 2, 4 * 16 * 16 * 2
    assert on["cpu"] == pytest.approx(map_bytes + image_bytes, rel=0.01)
    assert on["cuda"] == pytest.approx(2 * map_bytes + image_bytes, rel=0.01)


def test_attention_on_a_gpu_keeps_no_probabilities():
    from t2i.nn.attention import Attention

    with torch.device("meta"):
        network = Attention(32, heads=4, head_dim=8)

    def kept(length, precision):
        def inputs(batch):
            return {"x": torch.empty(batch, length, 32)}

        return activations(network, inputs, precision).per_image

    for precision in ("32-true", "bf16-mixed"):
        assert kept(2_048, precision) == pytest.approx(2 * kept(1_024, precision), rel=0.01)  # not 4 times


# A million numbers, gathered in 16 bits: nine tenths in blocks, of which the largest is a tenth of all.
TRAINED = Trained(1_000_000, 0, 1_000_000, 2_000_000, 2_000_000, 1_800_000, 200_000)
KEPT = Activations(fixed=1_900_000, per_image=1_000, per_image_checkpointed=100)


def share_of(strategy, checkpointing=False, num_gpus=16, trained=TRAINED) -> Memory:
    return memory(trained, KEPT, 0, 10, strategy, checkpointing, num_gpus, gpus_per_node=8)


def test_what_each_strategy_shards():
    """The table of the FSDP paper (2304.11277): what of the model's state a GPU of 16 in 2 nodes holds."""
    shards = {"ddp": 1, "full_shard": 16, "shard_grad_op": 16, "hybrid_shard": 8}
    gathered = {"ddp": 0, "full_shard": 600_000, "shard_grad_op": 2_200_000, "hybrid_shard": 600_000}
    for strategy in STRATEGIES:
        held = share_of(strategy)
        assert held.weights == 4_000_000 // shards[strategy] + gathered[strategy]
        assert (held.gradients, held.ema) == (4_000_000 // shards[strategy],) * 2
        assert held.optimizer == 8_000_000 // shards[strategy]
        assert (held.frozen, held.activations) == (2_000_000, 10_000)
        in_parts = memory(TRAINED, KEPT, 0, 10, strategy, False, 16, 8, accumulates=True)
        assert in_parts.gradients == 4_000_000  # added up before they are reduced


@pytest.fixture
def eight_processes():
    """This process as the first of eight whose messages go nowhere."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def run_on_eight(batch, strategy, precision) -> TrainerConfig:
    """On two machines of four."""
    each = {"batch_size": batch, "num_images": batch, "num_nodes": 2, "devices": 4}
    return TrainerConfig(**each, strategy=strategy, precision=precision)


@pytest.mark.parametrize(
    ("name", "precision", "strategy"),
    [
        *itertools.product(["tiny UNet", "DiT"], ["32-true"], ["full_shard", "shard_grad_op"]),
        ("DiT", "bf16-mixed", "full_shard"),
        ("DiT", "32-true", "hybrid_shard"),
    ],
)
def test_memory_of_sharded_training(eight_processes, name, precision, strategy):
    """As a run divides a network, by torch's FSDP and its own tracker."""
    config, batch = MODELS[name], 8
    network = build_denoiser(config, 4, WIDTH, WIDTH)
    trainer = run_on_eight(batch, strategy, precision)
    divide(network, blocks_of(network), mesh_of(trainer, torch.device("cpu")), trainer)
    optimizer = torch.optim.AdamW(network.parameters(), foreach=False)
    tracker = FSDPMemTracker(network, optimizer)
    with tracker:
        for _ in range(2):
            batch_of = {name: torch.rand_like(value) for name, value in inputs_for(config)(batch).items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                loss = network(**batch_of).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tracker.reset_mod_stats()
    real = tracker.get_tracker_snapshot("peak")[CPU]["Total"]

    planned = planned_for(config)
    kept = activations(planned.module, planned.inputs, precision, "cpu")
    trained = Trained(planned.parameters, 0, 0, 0, **sharded(planned, precision))
    expected = memory(trained, kept, 0, batch, strategy, False, num_gpus=8, gpus_per_node=4)
    assert expected.total == pytest.approx(real, rel=0.15)


def planned_for(config) -> PlannedNetwork:
    with torch.device("meta"):
        return PlannedNetwork(
            "denoiser", build_denoiser(config, 4, WIDTH, WIDTH), inputs_for(config), trained=True
        )


@pytest.mark.parametrize(
    ("name", "strategy"), [("tiny UNet", "full_shard"), ("DiT", "full_shard"), ("DiT", "hybrid_shard")]
)
def test_what_a_process_holds_and_gathers(eight_processes, name, strategy):
    """Byte for byte what FSDP divides and what it gathers: tensors of rows that eight does not divide, vectors in
    float32 beside matrices in 16 bits, and what stands beside the blocks."""
    config = MODELS[name]
    network, planned = build_denoiser(config, 4, WIDTH, WIDTH), planned_for(config)
    network.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))
    planned.module.register_parameter("scale", torch.nn.Parameter(torch.empty((), device="meta")))
    trainer = run_on_eight(8, strategy, "bf16-mixed")
    divide(network, blocks_of(network), mesh_of(trainer, torch.device("cpu")), trainer)
    trained = Trained(planned.parameters, 0, 0, 0, **sharded(planned, "bf16-mixed"))
    held = memory(trained, KEPT, 0, 1, strategy, False, num_gpus=8, gpus_per_node=4)
    divided = sum(own(p).nbytes for p in network.parameters())
    assert held.gradients == divided
    assert trained.share(1) == 1

    whole = {module: gathered_by(module) for module in network.modules() if isinstance(module, FSDPModule)}
    assert trained.gathered == sum(whole.values())
    assert trained.in_blocks == sum(whole.values()) - whole[network]
    assert trained.largest_block == max(size for module, size in whole.items() if module is not network)


def gathered_by(module) -> int:
    """Bytes of the weights that one FSDP module gathers, as it does."""
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None:  # all that it has is its blocks'
        return 0
    module.unshard()
    gathered = sum(each.unsharded_param.nbytes for each in group.fsdp_params)
    module.reshard()
    return gathered


def test_ddp_keeps_a_second_copy_of_the_gradients():
    assert share_of("ddp").buffers == share_of("ddp").gradients
    assert share_of("ddp", num_gpus=1).buffers == 0


def test_encoding_and_training_take_turns():
    held = dataclasses.replace(share_of("ddp"), encoding=7_000)
    assert held.total == share_of("ddp").total
    held = dataclasses.replace(held, encoding=11_000)
    assert held.total == share_of("ddp").total + 1_000
