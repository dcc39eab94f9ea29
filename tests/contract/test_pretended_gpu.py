"""What runs on a GPU in bf16-mixed, where there is none: tensors of the GPU have shapes, dtypes and a device but no
numbers (torch's FakeTensor), those of the host are real. An operation on both, or one that needs a number of the GPU,
is an error, as it is, or as the host would wait, on a real one. Autocast is CUDA's, and products are in bfloat16 but
where IN_SINGLE says why not."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2i import families
from t2i.config import RunConfig
from t2i.diffusion.config import SamplerName
from t2i.errors import ConfigError
from t2i.interfaces import SampleRequest
from t2i.nn.precision import mixed
from t2i.training.data import loader_from
from t2i.training.stage import BaseStage
from t2i.training.step import train_step
from t2i.training.validation import validation_losses

EXPERIMENTS = Path(__file__).parents[2] / "conf" / "experiment"
SMALL = sorted(
    path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.rglob("tiny_*.yaml")
)
ALL_SAMPLERS = "pixel_diffusion/tiny_flow_dit"
GPU = torch.device("cuda", 0)

# What takes most of the time and memory.
PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "convolution", "upsample_nearest2d")
}
# Functions within which they are in float32.
IN_SINGLE = {
    "Codebook._distance",  # the nearest of thousands of codes
    "PaletteCodec.tokens",  # the same
    "GumbelCodes.forward",  # a mean of codes by their probabilities
    "ToLogits.forward",  # as in DALL-E's code
    "Encoder.embedded",  # of pixel diffusion: as in ADM's code, also the next
    "Encoder.last",
    "NoisyMatcher.forward",  # logits of up to 100
    "known_part",  # masks
    "NamedAttention.__torch_function__.<locals>.scaled_dot_product_attention",  # torch shows what a CPU would do
}

pytestmark = pytest.mark.slow  # two minutes in all


def callers() -> Iterator[str]:
    """Names of what is being called, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_qualname
        frame = frame.f_back


class PretendedGPU(TorchDispatchMode):
    """wide: products in float32 but those within IN_SINGLE: what, and in which module"""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.wide: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        there = [
            each
            for each in tree_leaves((args, kwargs))
            if isinstance(each, FakeTensor) or (isinstance(each, torch.device) and each.type == "cuda")
        ]
        if not there:
            return func(*args, **kwargs)
        single = isinstance(there[0], Tensor) and there[0].dtype == torch.float32
        if func in PRODUCTS and single and IN_SINGLE.isdisjoint(callers()):
            self.wide.add((str(func), next(name for name in callers() if name.endswith(".forward"))))
        with self.fake:
            return func(*args, **kwargs)


class NamedAttention(TorchFunctionMode):
    """So that it is among the `callers`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def scaled_dot_product_attention() -> Any:
            return func(*args, **(kwargs or {}))

        return (
            scaled_dot_product_attention()
            if func is F.scaled_dot_product_attention
            else func(*args, **(kwargs or {}))
        )


def moved(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In the place of nn.Module._apply, which writes numbers that are not there."""
    for child in module.children():
        child._apply(change)
    for kept in (module._parameters, module._buffers):
        for name, old in kept.items():
            if old is None:
                continue
            new = change(old.detach())
            if (new.device, new.dtype) != (old.device, old.dtype):
                kept[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return module


def gradients(outputs: Any, inputs: Any, *others: Any, **how: Any) -> tuple[Tensor, ...]:
    """In the place of torch.autograd.grad: torch goes back through what ran on a GPU only where there is one."""
    return tuple(torch.empty_like(each) for each in ([inputs] if isinstance(inputs, Tensor) else inputs))


@pytest.fixture
def gpu(monkeypatch) -> Iterator[PretendedGPU]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(nn.Module, "_apply", moved)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    with PretendedGPU() as pretended, NamedAttention():
        yield pretended


def stage_of(config: RunConfig) -> BaseStage:
    torch.manual_seed(config.seed)
    return families.get(config.family).load_stage(config.stage)(config)


CODECS = [
    *(f"autoencoder/tiny_vq {other}" for other in ("codec.normalize=true", "codec=lfq", "codec=gumbel")),
    *(f"autoencoder/tiny_kl ~backbone.depth backbone=dvae codec={codec}" for codec in ("gumbel", "vq", "kl")),
    "autoencoder/tiny_kl ~backbone.depth ~backbone.width backbone=vit codec=fsq",
]
SUPER_RESOLUTION = ["masked_sr", "ar_sr"]


@pytest.mark.parametrize("asked", [*SMALL, *CODECS, *SUPER_RESOLUTION])
def test_two_steps_and_a_preview(asked, compose_small, super_resolution, gpu):
    """Forward, optimizer and average; gradients are taken as given."""
    name, *others = super_resolution.get(asked, asked.split())
    config = compose_small(name, *others, "trainer.num_images=800", "trainer.precision=bf16-mixed")
    stage = stage_of(config)
    stage.images_seen = 160  # a discriminator that waits has begun
    stage.to(GPU)
    stage.on_fit_start()
    stage.train()
    optimizers = stage.configure_optimizers()
    trainer: Any = SimpleNamespace(optimizers=optimizers, should_stop=False, world_size=1, global_rank=0)
    stage.trainer = trainer
    batches = iter(loader_from(config))

    def backward(loss: Tensor) -> None:
        assert (loss.device, loss.dtype) == (GPU, torch.float32)
        for parameter in (p for turn in stage.all_turns for group in turn.groups for p in group):
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    for _ in range(2):
        batch = next(batches).to(GPU)
        with mixed("bf16-mixed", GPU):
            assert torch.is_autocast_enabled("cuda")
            metrics = train_step(stage, stage.all_turns, optimizers, batch, backward, None)
    assert {value.device for value in metrics.values()} == {GPU}
    stage.eval()
    with torch.no_grad(), stage.averaged_weights(), mixed("bf16-mixed", GPU):
        if stage.has_times:
            assert {loss.device for loss in validation_losses(stage, [batch])} == {GPU}
        assert {drawn.device for drawn in stage.draw(batch).values()} == {GPU}
    assert gpu.wide == set()


def requests(size: int) -> list[SampleRequest]:
    """From noise, from a picture, and from one of which half stays."""
    image, mask = torch.zeros(2, 3, size, size), torch.zeros(2, 1, size, size)
    mask[..., : size // 2] = 1
    plain = SampleRequest(["a star", "a red circle"], [1, 2], size, size)
    pictured = dataclasses.replace(plain, image=image)
    return [plain, pictured, dataclasses.replace(pictured, mask=mask)]


@pytest.mark.parametrize(
    "asked", [*(each for each in SMALL if not each.startswith("autoencoder/")), *SUPER_RESOLUTION]
)
def test_drawing(asked, compose_small, super_resolution, gpu):
    name, *others = super_resolution.get(asked, [asked])
    config = compose_small(name, *others)
    model = stage_of(config).model.eval().to(GPU)
    model.text.to(GPU)
    sampling = config.model.sampling
    few = {"guidance_scale": 2.0, "steps": 3}
    sampling = dataclasses.replace(sampling, **{key: few[key] for key in few if hasattr(sampling, key)})
    samplers = get_args(SamplerName) if name == ALL_SAMPLERS else [None]
    drawn = 0
    for sampler in samplers:
        if sampler is not None:
            sampling = dataclasses.replace(sampling, sampler=sampler)
        for request in requests(config.resolution.size_px):
            with mixed("bf16-mixed", GPU), suppress(ConfigError):  # a family that starts from no picture
                assert model.generate(request, sampling).device == GPU
                drawn += 1
    assert drawn >= len(samplers)
    assert gpu.wide == set()


def test_it_sees_what_does_not_go_together(gpu):
    there, here = torch.ones(2, 2, device=GPU), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="device"):
        there + here
    with pytest.raises(DataDependentOutputException):
        there[0, 0].item()
    with mixed("bf16-mixed", GPU):
        assert (there @ there).dtype == torch.bfloat16
        assert there.pow(2).dtype == torch.float32
    assert gpu.wide == set()
    nn.Linear(2, 2).to(GPU)(there)
    assert {module for _, module in gpu.wide} == {"Linear.forward"}
    assert (here @ here).tolist() == [[2, 2], [2, 2]]
