"""What every stage shares: one LightningModule that counts images and says what the train step needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from t2i.config import RunConfig, run_to_dict
from t2i.interfaces import Batch, Feature, TextEncoder
from t2i.nn.precision import freezes_in_bf16
from t2i.training.blocks import prepare
from t2i.training.checkpoint import LoadedCheckpoint
from t2i.training.divided import reshard
from t2i.training.ema import EMA
from t2i.training.finite import SkippedSteps
from t2i.training.randomness import Randomness
from t2i.training.step import Turn, train_step

CHECKPOINT_FORMAT = 1
SEEDS = 2**64  # what torch's generators take; those of larger numbers are theirs modulo this


@runtime_checkable
class EncodesOnce(Protocol):
    """A text encoder that keeps what it makes of captions.

    encoding_s: that the host was busy with encoding so far
    keeps: whether so many captions would be kept, as far as is known by now
    """

    encoding_s: float

    def keeps(self, count: int) -> bool: ...


class BaseStage(L.LightningModule):
    """A family's stage derives from this and gives at least `losses`, `blocks` and `draw`.

    Progress is `images_seen`, over all processes; learning rate, EMA, data order and noise are pure functions
    of it and of the seed, so that a checkpoint needs no random state and a resumed run is exact.
    """

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        """start: weights to begin from; a family whose model depends on what it builds on reads that there."""
        super().__init__()
        self.automatic_optimization = False  # the train step is ours: t2i.training.step
        self.config = config
        self.images_seen = 0
        self.steps_done = 0
        self.ema: EMA | None = None
        self.all_turns: list[Turn] = []
        self.metrics: dict[str, Tensor] = {}  # of the last step, on the device
        self.skipped = SkippedSteps(torch.device("cpu"))
        self.cached_text: EncodesOnce | None = None

    # What a family gives.

    has_times = False
    """Whether `losses` of the first turn asks for `random.uniform("time")`, and so can be had at fixed times."""

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        """-> scalars by name; "loss" is what this turn minimises, the others are logged. What not each step has is
        (2,), a sum and the number of those that it is over: logged is the mean of all of them.

        turn: the name of one of `turns`
        random: the only source of what is drawn here, so that it depends on the seed and the samples' positions alone
        """
        raise NotImplementedError

    def turns(self) -> list[Turn]:
        """Who is trained, in which order: by default one turn, with all trained parameters as one group. Asked once,
        before training; a parameter belongs to one turn."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [Turn("train", [parameters], self.config.optimizer)]

    def blocks(self) -> list[nn.Module]:
        """The repeated modules of what is trained, in the order in which they run: what activation checkpointing,
        compilation and sharding work on, one at a time."""
        raise NotImplementedError

    def blocks_to_gather(self) -> list[nn.Module]:
        """Those of the blocks whose weights FSDP gathers for a pass through them, and frees again. Not those that
        `losses` differentiates itself: their weights have to be there for all of it."""
        return self.blocks()

    def idle_parameters(self) -> list[nn.Parameter]:
        """Trained ones that the step in progress leaves as they are: neither moved nor counted by the optimizer."""
        return []

    def averages(self) -> dict[str, nn.Parameter]:
        """Those that the EMA keeps an average of, by their names: by default all that are trained."""
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
        """Called once when the run is complete, with the averaged weights in place, with training pictures
        (B, 3, H, W) on the device."""

    def features(self) -> Mapping[str, Feature]:
        """What can be computed ahead of training, by name: what `t2i data encode` makes and `losses` takes from
        `batch.features` where it is there."""
        return {}

    def checkpoint_extra(self) -> dict[str, Any]:
        """Plain values (numbers, strings, lists, dictionaries) that a checkpoint needs beside the config."""
        return {}

    # What all share.

    @property
    def weight_dtype(self) -> torch.dtype:
        """float32, or float64 with trainer.precision=64-true."""
        return torch.float64 if self.config.trainer.precision == "64-true" else torch.float32

    @property
    def frozen_dtype(self) -> torch.dtype:
        """In which frozen networks work."""
        in_bf16 = freezes_in_bf16(self.config.trainer.precision, self.device)
        return torch.bfloat16 if in_bf16 else self.weight_dtype

    def place_text(self, text: TextEncoder) -> None:
        """Moves an encoder that may be frozen, and so no module of the stage, to its device."""
        text.to(self.device, self.weight_dtype if text.trainable else self.frozen_dtype)
        if isinstance(text, EncodesOnce) and self.cached_text is None:
            self.cached_text = text

    def frozen_names(self) -> list[str]:
        """Of the state dict, what belongs to networks in which nothing is trained."""
        trained = {id(p) for turn in self.all_turns for group in turn.groups for p in group}
        frozen = set[str]()
        for prefix, module in self.named_modules():
            ids = [id(p) for p in module.parameters()]
            if ids and trained.isdisjoint(ids):
                frozen |= {f"{prefix}.{name}" for name in module.state_dict()}
        return [name for name in self.state_dict() if name in frozen]

    @property
    def is_complete(self) -> bool:
        """Whether trainer.num_images were seen."""
        return self.images_seen >= self.config.trainer.num_images

    @property
    def images_per_step(self) -> int:
        """The batch over all processes."""
        return self.config.trainer.images_per_process * self.trainer.world_size

    def randomness(self, batch: Batch) -> Randomness:
        """What is drawn for the samples of this batch."""
        return Randomness(self.config.seed, batch.position, self.weight_dtype)

    def step_seed(self) -> int:
        """One number for (seed, images seen)."""
        return self.config.seed * 1_000_003 + self.images_seen

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step; called by Lightning within autocast's context and, over several processes, DDP's forward pass."""
        optimizers: Sequence[torch.optim.Optimizer] = self.trainer.optimizers
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        strategy = self.trainer.strategy
        no_sync = strategy.block_backward_sync if isinstance(strategy, ParallelStrategy) else nullcontext
        self.metrics = train_step(
            self, self.all_turns, optimizers, batch, self.manual_backward, scaler, no_sync
        )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        self.all_turns = self.turns()
        return [turn.build_optimizer() for turn in self.all_turns]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout layers draw from the global generators: seeded here, they too depend on (seed, images) alone.
        torch.manual_seed((self.step_seed() * 65_537 + self.global_rank) % SEEDS)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the model has its averaged weights, where it keeps any."""
        with self.ema.applied() if self.ema is not None else nullcontext():
            try:
                yield
            finally:
                reshard(self)

    def on_fit_start(self) -> None:
        settings = self.config.trainer
        prepare(self.blocks(), settings.activation_checkpointing, settings.compile)
        if self.config.ema is not None and self.ema is None:
            self.ema = EMA(self.averages(), self.config.ema)
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
        state = checkpoint["state_dict"]
        if frozen := {name: state.pop(name) for name in self.frozen_names()}:
            checkpoint["frozen"] = frozen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.images_seen = checkpoint["t2i"]["images_seen"]
        self.steps_done = checkpoint["t2i"]["steps_done"]
        self.skipped = SkippedSteps(self.device, checkpoint["t2i"].get("skipped_steps", 0))
        if self.config.ema is not None and "ema" in checkpoint:
            self.ema = EMA(self.averages(), self.config.ema)
            self.ema.load_state_dict(checkpoint["ema"])
