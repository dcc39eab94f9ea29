"""Activation checkpointing and compilation of the blocks change neither losses nor gradients, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i import families
from t2i.config import RunConfig
from t2i.errors import ConfigError
from t2i.training import step
from t2i.training.blocks import prepare
from t2i.training.data import loader_from
from t2i.training.stage import BaseStage

EXPERIMENTS = Path(__file__).parents[2] / "conf" / "experiment"
SMALL = sorted(
    path.relative_to(EXPERIMENTS).with_suffix("").as_posix() for path in EXPERIMENTS.rglob("tiny_*.yaml")
)


@pytest.fixture
def config_of(compose_small):
    def config_of(name: str, *more: str) -> RunConfig:
        return compose_small(name, "trainer.precision=64-true", "optimizer.gradient_clip=0.0", *more)

    return config_of


def stage_of(config: RunConfig) -> BaseStage:
    torch.manual_seed(0)
    stage = families.get(config.family).load_stage(config.stage)(config).double()
    for parameter in stage.parameters():  # none starts at zero, where gradients of others would be zero too
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    stage.images_seen = 160  # a discriminator that waits has begun
    stage.on_fit_start()
    return stage.train()


def losses_and_gradients(config: RunConfig, monkeypatch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Of one step on the first batch: what is logged, and the gradients of each turn."""
    gradients: list[Tensor] = []

    def clip(turn: Any, idle: Any) -> list[Tensor]:
        gradients.extend(p.grad.clone() for group in turn.groups for p in group if p.grad is not None)
        return original(turn, idle)

    original = step.clip
    stage = stage_of(config)
    trainer = SimpleNamespace(world_size=1, global_rank=0)
    stage.trainer = trainer  # type: ignore[assignment]
    batch = next(iter(loader_from(config))).to("cpu", torch.float64)
    stage.on_train_batch_start(batch, 0)
    with monkeypatch.context() as patched:
        patched.setattr(step, "clip", clip)
        optimizers = stage.configure_optimizers()
        metrics = step.train_step(stage, stage.all_turns, optimizers, batch, Tensor.backward, None)
    return metrics, gradients


def assert_same(config: RunConfig, other: RunConfig, monkeypatch) -> None:
    expected, gradients = losses_and_gradients(config, monkeypatch)
    found, other_gradients = losses_and_gradients(other, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3
    for actual, one in zip(other_gradients, gradients, strict=True):
        torch.testing.assert_close(actual, one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SMALL)
def test_activation_checkpointing(name, config_of, monkeypatch):
    again: list[Any] = []
    monkeypatch.setattr("t2i.training.blocks.checkpoint", counting(again))
    assert_same(config_of(name), config_of(name, "trainer.activation_checkpointing=true"), monkeypatch)
    assert len(again) > 2


def counting(calls: list[Any]) -> Any:
    from torch.utils.checkpoint import checkpoint

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, **kwargs)

    return counted


def test_only_the_inputs_of_a_block_are_kept():
    """And its parameters, which are there anyway."""
    block, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(16, 8, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * (tensor.shape[0] == 16))
        return tensor

    prepare([block], activation_checkpointing=True, compiled=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    assert sum(kept) <= x.numel()


def test_a_block_with_buffers_is_run_once():
    norm = nn.BatchNorm1d(4)
    prepare([norm], activation_checkpointing=True, compiled=False)
    norm(torch.randn(8, 4, requires_grad=True)).sum().backward()
    assert norm.num_batches_tracked == 1


@pytest.fixture
def eager_backend(monkeypatch) -> Iterator[None]:
    """Without the compiler of kernels, which takes minutes: the graphs, and their backward passes, are those."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward: compile_(forward, backend="aot_eager", fullgraph=True)
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


QUICK = ("latent_diffusion/tiny_dit_flow", ("trainer.activation_checkpointing=true",))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param(name, more, marks=() if (name, more) == QUICK else pytest.mark.slow)
        for name in SMALL
        for more in ((), QUICK[1])
    ],
)
def test_compilation(name, more, config_of, eager_backend, monkeypatch):
    more = (*more, *(["r1_weight=0.0"] if name == "gan_int_cls/tiny_r1" else []))
    plain = [each for each in more if each.startswith("r1")]
    assert_same(config_of(name, *plain), config_of(name, "trainer.compile=true", *more), monkeypatch)


@pytest.mark.parametrize(
    ("name", "key"),
    [("gan_int_cls/tiny_r1", "r1_weight=0.1"), ("autoencoder/tiny_kl", "adversarial.r1_weight=0.1")],
)
def test_what_is_differentiated_twice_is_not_compiled(name, key, config_of):
    with pytest.raises(
        ConfigError, match=r"trainer.compile is True; allowed: false with .*r1_weight above 0"
    ):
        stage_of(config_of(name, "trainer.compile=true", key))
