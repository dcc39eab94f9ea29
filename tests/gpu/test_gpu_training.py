"""What only one GPU can show: mixed precision, float64 against the CPU, memory against the plan, compiled networks.

Run by `make test-gpu`; skipped where there is no CUDA device.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from t2i.config import EMAConfig, OptimizerConfig
from t2i.families.latent_diffusion.config import UNetDenoiserConfig
from t2i.families.latent_diffusion.model import build_denoiser
from t2i.nn.dit_config import DiTConfig
from t2i.planning.count import activations, num_parameters
from t2i.planning.memory import Trained, memory
from t2i.training.ema import EMA
from t2i.training.optimizer import build_optimizer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
CHANNELS, WIDTH, LENGTH = 4, 64, 24
UNET = UNetDenoiserConfig(
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_heads=4,
    use_linear_in_transformer=False,
)
DIT = DiTConfig("dit", patch_size=2, width=192, depth=4, heads=6, refiner_depth=2)
NETWORKS = pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def network(config: UNetDenoiserConfig | DiTConfig) -> nn.Module:
    """With random weights throughout, so that layers that start at zero hide nothing."""
    torch.manual_seed(0)
    built = build_denoiser(config, CHANNELS, WIDTH, WIDTH)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return built.to(DEVICE)


def inputs(config: UNetDenoiserConfig | DiTConfig, batch: int = 4, size: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {
        "x": torch.randn(batch, CHANNELS, size, size, generator=generator),
        "t": torch.linspace(3, 990, batch),
        "context": torch.randn(batch, LENGTH, WIDTH, generator=generator),
        "pooled": torch.randn(batch, WIDTH, generator=generator),
    }
    if isinstance(config, UNetDenoiserConfig):
        del given["pooled"]
    return {name: value.to(DEVICE) for name, value in given.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@NETWORKS
@torch.no_grad()
def test_float64_is_the_cpus(config):
    built = network(config).double()
    given = {name: value.double() for name, value in inputs(config).items()}
    here = built(**given).cpu()
    there = built.cpu()(**{name: value.cpu() for name, value in given.items()})
    assert relative_error(here, there) < 1e-9


@NETWORKS
@HALVES
def test_autocast_is_close_to_float64_forward_and_backward(config, dtype):
    """Half precision has 8 (bf16) or 11 bits; the direction of the gradient is what training goes by."""
    built, given = network(config), inputs(config)

    def output_and_gradient(autocast: bool) -> tuple[Tensor, Tensor]:
        built.zero_grad()
        with torch.autocast("cuda", dtype, enabled=autocast):
            out = built(**given)
        out.double().square().mean().backward()
        return out.detach().double(), torch.cat([p.grad.flatten() for p in built.parameters()]).double()

    out, gradient = output_and_gradient(autocast=True)
    built.double()
    given = {name: value.double() for name, value in given.items()}
    exact_out, exact_gradient = output_and_gradient(autocast=False)
    assert relative_error(out, exact_out) < 0.05
    assert nn.functional.cosine_similarity(gradient, exact_gradient, dim=0) > 0.99


@NETWORKS
@torch.no_grad()
def test_compiled_in_one_graph_it_gives_the_same(config):
    built = network(config).double()
    given = {name: value.double() for name, value in inputs(config).items()}
    expected = built(**given)
    # Some constants of compiled code have single precision (1.4e-8 in the DiT, with torch 2.11 on a CPU).
    assert relative_error(torch.compile(built, fullgraph=True)(**given), expected) < 1e-6


def of_run(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("experiment", ["autoencoder/tiny_kl", "latent_diffusion/tiny_unet_eps"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_run_in_mixed_precision_is_that_in_float32(
    experiment: str, precision: str, compose_run: Callable, train: Callable, tmp_path: Path
):
    """The same data and noise: the first loss is the same to the precision of the halves, the weights stay float32 and
    finite, pictures are drawn, and the run goes on from its checkpoint."""
    runs = f"runs_dir={tmp_path}"
    on_gpu = ("trainer.accelerator=gpu", "trainer.num_images=32", "trainer.log_every_steps=1", runs)
    if experiment.startswith("latent"):
        train(compose_run("experiment=autoencoder/tiny_kl", "trainer.num_images=16", runs))
    plain, mixed = (
        train(compose_run(f"experiment={experiment}", *on_gpu, f"trainer.precision={each}")).folder
        for each in ("32-true", precision)
    )
    assert of_run(mixed, "loss")[0] == pytest.approx(of_run(plain, "loss")[0], rel=0.02)
    assert all(0 <= share <= 1 for share in of_run(mixed, "data_wait"))
    assert all(gib > 0 for gib in of_run(mixed, "peak_memory_gib"))
    weights = load_file(mixed / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    assert list((mixed / "samples").glob("*.png"))
    longer = (*on_gpu, "trainer.num_images=48", f"trainer.precision={precision}", f"resume={mixed}")
    assert train(compose_run(f"experiment={experiment}", *longer)).images_seen == 48


@NETWORKS
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_memory_is_as_planned(config, precision):
    """The most that is allocated in the second of two steps of AdamW with an average, against the plan."""
    batch, size = 32, 32
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    built = network(config)
    optimizer = build_optimizer(
        [built.parameters()], [], OptimizerConfig(learning_rate=1e-4, warmup_images=0)
    )
    ema = EMA(dict(built.named_parameters()), EMAConfig(half_life_images=1_000, rampup_ratio=0.05))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision != "32-true"):
            loss = built(**inputs(config, batch, size)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(batch, batch)

    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    real = torch.cuda.max_memory_allocated() - before

    def on_meta(batch: int) -> dict[str, Tensor]:
        shapes = {name: value.shape[1:] for name, value in inputs(config, 1, size).items()}
        return {name: torch.empty(batch, *shape) for name, shape in shapes.items()}

    with torch.device("meta"):
        planned = build_denoiser(config, CHANNELS, WIDTH, WIDTH)
    count = num_parameters(planned)
    trained = Trained(
        parameters=count,
        muon=0,
        averaged=count,
        frozen_bytes=0,
        gathered=0,
        in_blocks=0,
        largest_block=0,
    )
    kept = activations(planned, on_meta, precision, "cuda")
    plan = memory(trained, kept, 0, batch, "ddp", checkpointing=False, num_gpus=1, gpus_per_node=1)
    assert plan.total == pytest.approx(real, rel=0.25)
