"""What every stage shares: one LightningModule that counts images, steps its EMA and logs without waiting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from t2i.config import RunConfig, run_to_dict
from t2i.interfaces import Batch, FeatureMakers
from t2i.training.checkpoint import LoadedCheckpoint
from t2i.training.ema import EMA
from t2i.training.finite import SkippedSteps
from t2i.training.optimizer import build_optimizer, learning_rate

CHECKPOINT_FORMAT = 1
SEEDS = 2**64  # what torch's generators take; those of larger numbers are theirs modulo this


class BaseStage(L.LightningModule):
    """A family's stage derives from this and gives `losses`, `parameter_groups` and `draw`.

    Progress is `images_seen`, over all processes; learning rate, EMA, data order and noise are pure functions
    of it and of the seed, so that a checkpoint needs no random state and a resumed run is exact.
    """

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        """start: weights to begin from; a family whose model depends on what it builds on reads that there."""
        super().__init__()
        self.config = config
        self.images_seen = 0
        self.steps_done = 0
        self.ema: EMA | None = None
        self.metrics: dict[str, Tensor] = {}  # of the last step, on the device
        self.skipped = SkippedSteps(torch.device("cpu"))

    # What a family gives.

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """-> scalars by name; "loss" is what is minimised, the others are logged."""
        raise NotImplementedError

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Trained parameters, grouped by the loss they follow; each group is clipped by itself."""
        return [[p for p in self.parameters() if p.requires_grad]]

    def idle_parameters(self) -> list[nn.Parameter]:
        """Trained ones that the step in progress leaves as they are: neither moved nor counted by the optimizer."""
        return []

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Those that Muon steps where `optimizer.muon_scale` asks for it."""
        return []

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Those that the EMA keeps an average of: by default all that are trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def inference_weights(self) -> dict[str, Tensor]:
        """What the final weights file holds: the state dict, averaged where there is an EMA."""
        return self.state_dict() | (self.ema.state_dict() if self.ema is not None else {})

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures to look at while training, by name: (N, 3, H, W) in [-1, 1]. `batch` is always the same
        held-out one."""
        raise NotImplementedError

    def before_training(self, images: Iterable[Tensor]) -> None:
        """Called once, on a fresh run (neither resumed nor started from other weights), with training pictures
        (B, 3, H, W) on the CPU."""

    def after_training(self, images: Iterable[Tensor]) -> None:
        """Called once when the run is complete, with training pictures (B, 3, H, W) on the device."""

    def feature_makers(self) -> FeatureMakers | None:
        """What `t2i data encode` runs for this stage; None where the stage trains on pictures."""
        return None

    def checkpoint_extra(self) -> dict[str, Any]:
        """Plain values (numbers, strings, lists, dictionaries) that a checkpoint needs beside the config."""
        return {}

    # What all share.

    @property
    def weight_dtype(self) -> torch.dtype:
        """float32, or float64 with trainer.precision=64-true."""
        return next(self.parameters()).dtype

    @property
    def is_complete(self) -> bool:
        """Whether trainer.num_images were seen."""
        return self.images_seen >= self.config.trainer.num_images

    @property
    def images_per_step(self) -> int:
        """The batch over all processes."""
        return self.config.trainer.batch_size * self.trainer.world_size

    def this_process(self, whole: Tensor) -> Tensor:
        """The rows of this process, of a tensor whose rows are the batch over all processes: every n-th, as the
        data has it (see `t2i.data.order`). What is drawn for the whole batch and then cut is the same for 1 process
        with batch 8 and for 2 with batch 4."""
        return whole[self.global_rank :: self.trainer.world_size]

    def noise(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) ~ N(0, I): this process's part of what `generator` draws for the whole batch."""
        return self.this_process(
            torch.randn(
                (self.images_per_step, *shape),
                generator=generator,
                device=self.device,
                dtype=self.weight_dtype,
            )
        )

    def step_generator(self) -> torch.Generator:
        """A generator on this device, seeded by (seed, images seen)."""
        return torch.Generator(device=self.device).manual_seed(self.step_seed() % SEEDS)

    def step_seed(self) -> int:
        """One number for (seed, images seen)."""
        return self.config.seed * 1_000_003 + self.images_seen

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self.metrics = {name: value.detach() for name, value in losses.items()}
        return losses["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.parameter_groups(), self.hidden_matrices(), self.config.optimizer)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clips each group of `parameter_groups` by its own norm, and logs it; where one is not finite, the optimizer
        leaves this step out."""
        for parameter in self.idle_parameters():
            parameter.grad = None
        norms = []
        for i, group in enumerate(self.parameter_groups()):
            gradients = [p.grad for p in group if p.grad is not None]
            if not gradients:
                continue
            norms.append(nn.utils.get_total_norm(gradients))
            if self.config.optimizer.gradient_clip:
                nn.utils.clip_grads_with_norm_(group, self.config.optimizer.gradient_clip, norms[-1])
            self.metrics["gradient_norm" if i == 0 else f"gradient_norm_{i}"] = norms[-1]
        self.trainer.optimizers[0].found_inf = self.skipped.count(norms)  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout layers draw from the global generators: seeded here, they too depend on (seed, images) alone.
        torch.manual_seed((self.step_seed() * 65_537 + self.global_rank) % SEEDS)
        rate = learning_rate(self.config.optimizer, self.images_seen, self.config.trainer.num_images)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate * group["rate_scale"]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.images_seen += self.images_per_step
        self.steps_done += 1
        if self.ema is not None:
            self.ema.update(self.images_per_step, self.images_seen)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the model has its averaged weights, where it keeps any."""
        with self.ema.applied() if self.ema is not None else nullcontext():
            yield

    def on_fit_start(self) -> None:
        if self.config.ema is not None and self.ema is None:
            self.ema = EMA(self.averaged_parameters(), self.config.ema)
        if self.ema is not None:
            self.ema.to(self.device)
        self.skipped = SkippedSteps(self.device, int(self.skipped.total))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning's loop counters would make a resumed fit count batches of a loader that starts elsewhere.
        checkpoint.pop("loops", None)
        checkpoint["t2i"] = {
            "format": CHECKPOINT_FORMAT,
            "config": run_to_dict(self.config),
            "images_seen": self.images_seen,
            "steps_done": self.steps_done,
            "skipped_steps": int(self.skipped.total),
            "extra": self.checkpoint_extra(),
        }
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen = checkpoint["t2i"]["images_seen"]
        self.steps_done = checkpoint["t2i"]["steps_done"]
        self.skipped = SkippedSteps(torch.device("cpu"), checkpoint["t2i"].get("skipped_steps", 0))
        if self.config.ema is not None and "ema" in checkpoint:
            self.ema = EMA(self.averaged_parameters(), self.config.ema)
            self.ema.load_state_dict(checkpoint["ema"])
