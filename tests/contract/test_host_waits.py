"""Between two logs, and from one step of drawing to the next, the host waits for nothing: the tensors of a step stay on
their device, which here is "meta": it holds no numbers, so that asking for one is an error, and a copy to it is seen
by a dispatch mode."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2i import families
from t2i.config import RunConfig
from t2i.diffusion.config import SamplerName
from t2i.interfaces import Batch, SampleRequest
from t2i.nn.transfer import placed
from t2i.text.cache import _HostRows
from t2i.training.callbacks import Metrics, StopAtEnd, StopOnSignal
from t2i.training.data import loader_from
from t2i.training.saving import Checkpoints, NotFinite
from t2i.training.stage import BaseStage
from t2i.training.step import train_step

EXPERIMENTS = Path(__file__).parents[2] / "conf" / "experiment"
SMALL = sorted(
    path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.rglob("tiny_*.yaml")
)
# These copy without waiting: from page-locked memory, where there is a GPU.
MAY_COPY = {f.__code__ for f in (placed, Batch.to, _HostRows.get, _HostRows.put)}
MAKE_TENSORS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}


def callers() -> Iterator[CodeType]:
    """What is being called, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def on_host(value: Any) -> bool:
    """A tensor there; a number that was made a tensor goes into a kernel's arguments."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.ndim > 0


class NoWaiting(TorchDispatchMode):
    """Fails where a number is asked for, and where tensors are copied between the host and the device elsewhere than in
    MAY_COPY. Within `placing` all may copy."""

    placing = False

    def may_copy(self) -> bool:
        return self.placing or not MAY_COPY.isdisjoint(callers())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        asks = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert not (asks and on_device(args[0])), f"{func} of a tensor on the device"
        if func is torch.ops.aten.copy_.default and on_device(args[1]) and not on_device(args[0]):
            assert self.may_copy(), "a copy from the device"
            return args[0]  # which meta cannot do
        out = func(*args, **kwargs)
        touches_device = any(map(on_device, [*given, *tree_leaves(out)]))
        mixed = touches_device and any(map(on_host, given))
        assert not mixed or self.may_copy(), f"{func} takes a tensor of the host"
        return out


class NoHostData(TorchFunctionMode):
    """Fails where a tensor on the device is made, or indexed, from numbers of the host: those copies are below what a
    dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        assert not (func in MAKE_TENSORS and on_device(out)), f"{func} of numbers of the host"
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and on_device(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(each, list) for each in index), "indexed by a list"
        return out


def stage_of(config: RunConfig) -> BaseStage:
    torch.manual_seed(config.seed)
    return families.get(config.family).load_stage(config.stage)(config)


@pytest.fixture
def on_meta(monkeypatch) -> Iterator[None]:
    """Modules can be moved to the meta device, and stepped there as on a GPU."""
    supported = lambda: ["cpu", "cuda", "meta"]  # noqa: E731
    monkeypatch.setattr(
        sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", supported
    )
    autocast = torch.autocast  # which knows no such device
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **how: autocast("cpu" if kind == "meta" else kind, **how)
    )
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


QUANTISERS = [
    f"autoencoder/tiny_vq {other}" for other in ("codec.normalize=true", "codec=lfq", "codec=gumbel")
]


@pytest.mark.parametrize("asked", [*SMALL, *QUANTISERS])
def test_a_step_between_logs_waits_for_nothing(asked, compose_small, on_meta, tmp_path):
    """The first step places tables and makes the optimizer's state, the second is looked at."""
    name, *others = asked.split()
    config = compose_small(name, *others, "trainer.log_every_steps=100", "trainer.num_images=800")
    stage = stage_of(config)
    stage.images_seen = 160  # a discriminator that waits has begun
    stage.to("meta")
    stage.on_fit_start()
    stage.train()
    optimizers = stage.configure_optimizers()
    trainer: Any = SimpleNamespace(optimizers=optimizers, should_stop=False, world_size=1, global_rank=0)
    stage.trainer = trainer
    callbacks = [
        StopAtEnd(),
        StopOnSignal(say=print),
        Metrics(),
        NotFinite(tmp_path),
        Checkpoints(tmp_path, config.trainer),
    ]
    batches = iter(loader_from(config))

    def step() -> None:
        batch = next(batches).to(stage.device)
        stage.on_train_batch_start(batch, 0)
        train_step(stage, stage.all_turns, optimizers, batch, torch.Tensor.backward, None)
        for callback in callbacks:
            callback.on_train_batch_end(trainer, stage, None, batch, 0)

    with NoWaiting() as mode:
        mode.placing = True
        step()
        mode.placing = False
        with NoHostData():
            step()
    assert stage.steps_done == 2
    assert not trainer.should_stop


DRAWN = [each for each in SMALL if not each.startswith(("autoencoder/", "gan_int_cls/"))]  # in steps
ALL_SAMPLERS = "pixel_diffusion/tiny_flow_dit"
STEPS = 5


class Ended(Exception):
    pass


@pytest.mark.parametrize("name", DRAWN)
def test_a_step_of_drawing_waits_for_nothing(name, compose_small, on_meta):
    """With guidance, from noise; what is placed once for all steps is placed in the first one."""
    config = compose_small(name)
    model = stage_of(config).model.eval().to("meta")
    model.text.to("meta")
    size = config.resolution.size_px
    request = SampleRequest(["a star", "a red circle"], [1, 2], size, size, "a hat")
    sampling = dataclasses.replace(config.model.sampling, guidance_scale=2.0)
    if hasattr(sampling, "steps"):
        sampling = dataclasses.replace(sampling, steps=STEPS)
    mode = NoWaiting()

    def progress(done: int, total: int) -> None:
        mode.placing = False
        if done == STEPS:
            raise Ended

    for more in [{"sampler": each} for each in get_args(SamplerName)] if name == ALL_SAMPLERS else [{}]:
        mode.placing = True
        with mode, NoHostData(), pytest.raises(Ended):
            model.generate(request, dataclasses.replace(sampling, **more), progress)
