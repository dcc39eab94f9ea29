"""One training run, from a validated configuration to a run folder."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from torch import Tensor

from t2i.config import RunConfig, run_to_dict
from t2i.data.encoded import Record, check_same
from t2i.data.loader import BatchLoader, build_loader
from t2i.data.reader import read_all
from t2i.data.sources import Limits
from t2i.errors import CheckpointError, ConfigError, DataError
from t2i.interfaces import Batch
from t2i.training import run_folder
from t2i.training.callbacks import (
    Checkpoints,
    Forecast,
    Metrics,
    Pictures,
    ProgressBar,
    StopAtEnd,
    StopOnSignal,
)
from t2i.training.checkpoint import LoadedCheckpoint, load, save_final
from t2i.training.loggers import build_loggers
from t2i.training.stage import BaseStage

NUM_PREVIEW_PICTURES = 16
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """folder: the run's; complete: False where a signal stopped it; seconds: of training"""

    folder: Path
    complete: bool
    images_seen: int
    seconds: float


class ShardData(L.LightningDataModule):
    """The training loader, started where the stage stands."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        stage = self.trainer.lightning_module
        assert isinstance(stage, BaseStage)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        loader = loader_from(self.config, rank, world, stage.images_seen)
        _check_same_everywhere(loader.fingerprint())
        return loader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        assert self.trainer is not None
        stage = self.trainer.lightning_module
        assert isinstance(stage, BaseStage)
        return batch.to(device, stage.weight_dtype)


def _check_same_everywhere(fingerprint: str) -> None:
    """Raises DataError where processes see other shards: each would then follow an order of its own."""
    if not dist.is_initialized():
        return
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, fingerprint)
    if len(set(seen)) > 1:
        others = [rank for rank, each in enumerate(seen) if each != seen[0]]
        raise DataError(
            f"data.shards: processes {', '.join(map(str, others))} see other shards, or other sizes of them, than "
            "process 0; is a disk not mounted on a node, or was `t2i data index` not finished?"
        )


def loader_from(config: RunConfig, rank: int = 0, world_size: int = 1, start_images: int = 0) -> BatchLoader:
    """The batches of one process from `start_images` (over all processes) on, without end."""
    return build_loader(
        config.data,
        size_px=config.resolution.size_px,
        batch_size=config.trainer.batch_size,
        text_dropout=config.resolution.text_dropout,
        min_original_px=config.resolution.min_original_px,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        start_images=start_images,
    )


def fit(config: RunConfig, stage_class: type[BaseStage], console: Console) -> FitResult:
    """Trains, and leaves in the run folder what the architecture page promises.

    Raises UserError (a sentence) where data, checkpoints or configuration do not fit.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    resumed = _resumed_run(config)
    if resumed:
        _check_same_run(config, resumed)
    L.seed_everything(config.seed, verbose=False)
    if resumed is None:
        config, start = fresh_start(config)
    else:
        config = dataclasses.replace(config, init_from=None)
        start = load(run_folder.checkpoints(resumed)[-1], use_ema=False)
    stage = stage_class(config, start)
    if config.trainer.precision == "64-true":
        stage.double()  # before a checkpoint is loaded: Lightning's turn comes after it
    _check_encoded(config, stage)
    preview = preview_batch(config)
    if start is None:
        stage.before_training(image.to(stage.weight_dtype) for image in _some_images(config))

    folder = (
        run_folder.enter(resumed)
        if resumed
        else run_folder.create(config.runs_dir, config.stage, config.name)
    )
    if resumed is None:
        run_folder.write_config(folder, run_to_dict(stage.config))
    checkpoint = run_folder.checkpoints(folder)[-1] if resumed else None
    steps_done = int(checkpoint.stem.removeprefix("step_")) if checkpoint else 0
    log.info("run folder: %s", folder)

    metrics = Metrics()
    pictures, saver = Pictures(folder, preview), Checkpoints(folder)
    stop = StopOnSignal(say=console.print)
    trainer = L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if _is_distributed(config) else "auto",
        precision=config.trainer.precision,
        max_epochs=-1,
        logger=build_loggers(config, folder, steps_done),
        callbacks=[
            StopAtEnd(),
            stop,
            metrics,
            Forecast(),
            ProgressBar(console, metrics),
            pictures,
            saver,
            Finish(config, folder, pictures, saver, stop),
        ],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if trainer.is_global_zero:
        run_folder.write_environment(folder, device=_device_name(trainer))
    began = time.perf_counter()
    with warnings.catch_warnings():
        # But for the last, these are our intent.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*max_epochs.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own, on torch 2.15
        try:
            trainer.fit(stage, ShardData(config), ckpt_path=checkpoint, weights_only=True)
        finally:
            stop.restore()
            run_folder.leave()
    result = FitResult(folder, not stop.stopped, stage.images_seen, time.perf_counter() - began)
    if trainer.is_global_zero:
        run_folder.write_summary(folder, result.complete, result.images_seen, result.seconds)
    return result


def _check_encoded(config: RunConfig, stage: BaseStage) -> None:
    """Raises DataError unless cached features are what this stage would compute."""
    for key, part in config.data.parts().items():
        if part.encoded is not None:
            makers = stage.feature_makers()
            if makers is None:
                raise ConfigError(
                    f"{key}.encoded is {part.encoded!r}; allowed for stage={config.stage}: null."
                )
            check_same(part.encoded, Record.read(part.encoded, Limits(config.data.deadline_s)), makers)


class Finish(L.Callback):
    """The end of a run: what the stage measures, last pictures, last checkpoint, final weights."""

    def __init__(
        self, config: RunConfig, folder: Path, pictures: Pictures, saver: Checkpoints, stop: StopOnSignal
    ) -> None:
        self.config, self.folder, self.pictures, self.saver, self.stop = config, folder, pictures, saver, stop

    def on_train_end(self, trainer: L.Trainer, stage: Any) -> None:
        if not self.stop.stopped:
            with torch.no_grad():
                stage.after_training(
                    image.to(stage.device, stage.weight_dtype) for image in _some_images(self.config)
                )
            self.pictures.draw(trainer, stage)
        self.saver.save(trainer, stage)
        if trainer.is_global_zero and not self.stop.stopped:
            save_final(stage, self.folder / run_folder.FINAL_WEIGHTS)


def preview_batch(config: RunConfig) -> Batch:
    """The same few pictures for every grid of a run: held-out ones where the data has them."""
    first = next(iter(config.data.parts().values()))
    shards = config.data.heldout_shards or first.shards
    return read_all(first, shards, config.resolution.size_px, NUM_PREVIEW_PICTURES, allow_pipes=True)


def _some_images(config: RunConfig, num_images: int = 512) -> Iterator[Tensor]:
    """Square pictures (B, 3, H, W) from the start of the training data, the same in every process."""
    mixture = {name: dataclasses.replace(part, encoded=None) for name, part in config.data.mixture.items()}
    data = dataclasses.replace(config.data, mixture=mixture, encoded=None, bucket_step_px=None)
    loader = iter(loader_from(dataclasses.replace(config, data=data)))
    for _ in range(-(-num_images // config.trainer.batch_size)):
        yield next(loader).to("cpu").image


def _resumed_run(config: RunConfig) -> Path | None:
    """The run folder that config.resume means."""
    if config.resume is None:
        return None
    if config.resume == "latest":
        found = run_folder.newest_run(config.runs_dir, config.stage)
        if found is None:
            raise CheckpointError(
                f"resume=latest found no run with a checkpoint in {config.runs_dir}/{config.stage}."
            )
        return found
    folder = Path(config.resume)
    if not run_folder.checkpoints(folder):
        raise CheckpointError(f"{folder} holds no checkpoint to resume from (checkpoints/step_*.ckpt).")
    return folder


def _check_same_run(config: RunConfig, folder: Path) -> None:
    """Raises CheckpointError where `config` says other than the run that it resumes, in what makes the run."""
    free = {"name", "runs_dir", "init_from", "resume", "autoencoder", "trainer", "logger"}
    saved, said = run_folder.read_config(folder), run_folder.as_saved(run_to_dict(config))
    for key in sorted(said.keys() - free):
        if saved.get(key) != said[key]:
            raise CheckpointError(
                f"{folder} was trained with {key}={saved.get(key)}, this command says {key}={said[key]}; resume "
                f"needs the run's own command. To start a new run from its weights use init_from={folder}."
            )


def _initial_run(config: RunConfig) -> str | None:
    """config.init_from, with "lower" replaced by the run that it means, or by None where there is none."""
    if config.init_from != "lower":
        return config.init_from
    lower = run_folder.newest_run(config.runs_dir, config.stage, below_px=config.resolution.size_px)
    if lower is None:
        log.info("no lower-resolution run of %s in %s: starts from scratch", config.stage, config.runs_dir)
        return None
    log.info("continues the lower-resolution run %s", lower)
    return str(lower)


def fresh_start(config: RunConfig) -> tuple[RunConfig, LoadedCheckpoint | None]:
    """A new run's configuration, with what its init_from means, and the weights that it starts from, if any."""
    config = dataclasses.replace(config, init_from=_initial_run(config))
    return config, load(run_folder.weights_file(config.init_from)) if config.init_from else None


def _is_distributed(config: RunConfig) -> bool:
    return config.trainer.devices * config.trainer.num_nodes > 1


def _device_name(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
