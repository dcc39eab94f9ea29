"""The train step: one short algorithm for every stage, whatever it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2i.config import OptimizerConfig
from t2i.interfaces import Batch
from t2i.training.divided import group_of, is_divided, own
from t2i.training.finite import any_not_finite
from t2i.training.optimizer import build_optimizer, learning_rate
from t2i.training.ranges import part_of_step

if TYPE_CHECKING:
    from t2i.training.stage import BaseStage


@dataclass(frozen=True)
class Turn:
    """One of a step's turns: whose parameters move, and how. A GAN has two, most stages one.

    name: what `BaseStage.losses` is asked for
    groups: the parameters, grouped by the loss that they follow; each group is clipped by its own norm
    optimizer: its settings
    hidden: of the parameters, the matrices between hidden layers, which Muon steps where optimizer.muon_scale asks
        for it
    every: the turn is taken in every so many steps
    """

    name: str
    groups: Sequence[Sequence[nn.Parameter]]
    optimizer: OptimizerConfig
    hidden: Sequence[nn.Parameter] = ()
    every: int = 1

    def build_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.groups, self.hidden, self.optimizer)


def train_step(
    stage: BaseStage,
    turns: Sequence[Turn],
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    backward: Callable[[Tensor], None],
    scaler: torch.amp.GradScaler | None,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Tensor]:
    """For each turn: losses and gradients of each micro-batch, clip, step. Then the averages. Returns what there is to
    log, on the device: losses are averaged over the micro-batches.

    turns: the stage's; optimizers: one for each; batch: of this process
    backward: adds the gradients of a loss; called within autocast's context, as the losses are
    scaler: of the loss, with precision=16-mixed
    no_sync: within its context a backward pass leaves gradients to their process: that of each micro-batch but the
        last, so that they are summed over the processes once in each turn
    A turn whose gradients are not finite changes nothing; nothing here waits for the device.
    """
    metrics: dict[str, Tensor] = {}
    norms: list[Tensor] = []
    parts = batch.split(stage.config.trainer.parts(len(batch)))
    for turn, optimizer in zip(turns, optimizers, strict=True):
        if stage.steps_done % turn.every:
            continue
        set_learning_rate(optimizer, turn.optimizer, stage)
        with part_of_step("optimizer"):
            optimizer.zero_grad()
        with only_trained(turn, turns):
            for part in parts:
                with nullcontext() if part is parts[-1] else no_sync():
                    with part_of_step("forward"):
                        losses = stage.losses(turn.name, part, stage.randomness(part))
                    with part_of_step("backward"):
                        backward(losses["loss"] / len(parts))
                for name, value in logged(losses, turn, turns).items():
                    metrics[name] = metrics.get(name, 0) + value.detach() / len(parts)
        with part_of_step("optimizer"), torch.autocast(stage.device.type, enabled=False):
            if scaler is not None:
                scaler.unscale_(optimizer)
            found = clip(turn, stage.idle_parameters())
            optimizer.found_inf = any_not_finite(list(found.values()))  # type: ignore[attr-defined]  # read by a fused optimizer
            optimizer.step()
        torch.clear_autocast_cache()  # of weights that have moved
        of = "gradient_norm" if len(turns) == 1 else f"gradient_norm_{turn.name}"
        metrics |= {f"{of}_{i}" if i else of: norm for i, norm in found.items()}
        norms += found.values()
    if scaler is not None:
        scaler.update()
    stage.skipped.count(norms)
    stage.images_seen += stage.images_per_step
    stage.steps_done += 1
    if stage.ema is not None:
        with part_of_step("optimizer"):
            stage.ema.update(stage.images_per_step, stage.images_seen)
    return metrics


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, stage: BaseStage) -> None:
    """That of the images seen."""
    rate = learning_rate(config, stage.images_seen, stage.config.trainer.num_images)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]


@contextmanager
def only_trained(turn: Turn, turns: Sequence[Turn]) -> Iterator[None]:
    """Within this context the parameters of the other turns get no gradients."""
    trained = (p for other in turns if other is not turn for group in other.groups for p in group)
    others = [p for p in trained if p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def clip(turn: Turn, idle: Sequence[nn.Parameter]) -> dict[int, Tensor]:
    """Clips each group of parameters by its own norm; the norms before, () each, of those that have gradients, by the
    group's number.

    idle: those that this step leaves as they are: neither moved nor counted by the optimizer
    """
    for parameter in idle:
        parameter.grad = None
    norms = {}
    for i, group in enumerate(turn.groups):
        gradients = [p.grad for p in group if p.grad is not None]
        if not gradients:
            continue
        norms[i] = total_norm(gradients)
        if largest := turn.optimizer.gradient_clip:
            factor = torch.clamp(largest / (norms[i] + 1e-6), max=1.0)
            torch._foreach_mul_([own(gradient) for gradient in gradients], factor)
    return norms


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """(), of all of them, whichever process holds which rows."""
    if (group := group_of(gradients)) is None:
        return nn.utils.get_total_norm(gradients)
    divided = [own(gradient) for gradient in gradients if is_divided(gradient)]
    square = nn.utils.get_total_norm(divided).square()
    dist.all_reduce(square, group=group)
    if others := [gradient for gradient in gradients if not is_divided(gradient)]:
        square += nn.utils.get_total_norm(others).square()
    return square.sqrt()


def logged(losses: dict[str, Tensor], turn: Turn, turns: Sequence[Turn]) -> dict[str, Tensor]:
    """What is minimised is logged as "loss", or where there are several turns by the turn's name."""
    if len(turns) == 1:
        return losses
    return {turn.name if name == "loss" else name: value for name, value in losses.items()}
