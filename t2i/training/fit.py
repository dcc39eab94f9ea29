"""One training run, from a validated configuration to a run folder."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from t2i.config import RunConfig, check, run_to_dict
from t2i.data.encoded import Record, check_same
from t2i.data.sources import Limits
from t2i.errors import ConfigError
from t2i.interfaces import Batch
from t2i.launch import processes
from t2i.launch.ranks import Rank, is_first
from t2i.launch.watch import patience_s
from t2i.nn.precision import chosen
from t2i.training import run_folder
from t2i.training.callbacks import (
    Forecast,
    Metrics,
    Pictures,
    ProgressBar,
    StopAtEnd,
    StopOnSignal,
    Watched,
)
from t2i.training.checkpoint import LoadedCheckpoint, load
from t2i.training.data import ShardData, preview_batch, some_images
from t2i.training.drawn import Drawn, Measure
from t2i.training.loggers import build_loggers, log_config
from t2i.training.resuming import config_of, resumed_run
from t2i.training.saving import Checkpoints, Finish, NotFinite
from t2i.training.stage import BaseStage
from t2i.training.strategy import ShardedStrategy
from t2i.training.validation import Validation, heldout_batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """folder: the run's; complete: False where a signal stopped it; seconds: of training"""

    folder: Path
    complete: bool
    images_seen: int
    seconds: float


def fit(
    config: RunConfig,
    stage_class: type[BaseStage],
    console: Console,
    mfu_per_rate: float | None = None,
    measure: Measure | None = None,
) -> FitResult:
    """Trains, and leaves in the run folder what the architecture page promises.

    mfu_per_rate: see `Metrics`; measure: of what is drawn, with trainer.evaluate_every_images
    Raises UserError (a sentence) where data, checkpoints, devices or configuration do not fit, and where numbers are
    not finite any more.
    """
    config = set_up(config)
    resumed = processes.from_first(lambda: resumed_run(config))
    config = with_precision(config, resumed)
    L.seed_everything(config.seed % 2**32, verbose=False)
    if resumed is None:
        config, start = fresh_start(config)
    else:
        config = dataclasses.replace(config, init_from=None)
        start = load(run_folder.checkpoints(resumed)[-1], use_ema=False)
    stage = build_stage(config, stage_class, start)
    preview = preview_batch(config)
    if start is None:
        stage.before_training(image.to(stage.weight_dtype) for image in some_images(config))
    began = time.perf_counter()
    reuse = config.resume == "auto"
    with run_folder.opened(config.runs_dir, config.stage, config.name, resumed, reuse) as folder:
        if resumed is None and is_first(os.environ):
            run_folder.write_config(folder, run_to_dict(stage.config))
        log.info("run folder: %s", folder)
        trainer = _train(config, stage, folder, preview, console, Metrics(mfu_per_rate), measure)
        result = FitResult(folder, stage.is_complete, stage.images_seen, time.perf_counter() - began)
        if trainer.is_global_zero:
            run_folder.write_summary(folder, result.complete, result.images_seen, result.seconds)
    processes.leave()
    return result


def set_up(config: RunConfig) -> RunConfig:
    """Joins the processes of the run and readies torch. Raises ConfigError where the machine is not as configured."""
    config = _with_processes(config, processes.join(os.environ, config.trainer.deadline_s))
    _check_devices(config)
    return config


def build_stage(config: RunConfig, stage_class: type[BaseStage], start: LoadedCheckpoint | None) -> BaseStage:
    """In the precision of the run. Raises DataError where cached features are not its own."""
    stage = stage_class(config, start)
    if config.trainer.precision == "64-true":
        stage.double()  # before a checkpoint is loaded: Lightning's turn comes after it
    _check_encoded(config, stage)
    return stage


def _with_processes(config: RunConfig, rank: Rank) -> RunConfig:
    """Where torchrun or srun started the processes, it is they that say how many there are. Raises ConfigError where
    the command says other numbers."""
    if rank.world == 1:
        return config
    given = config.trainer.devices * config.trainer.num_nodes
    check(given in (1, rank.world), "trainer.devices", given, f"{rank.world}, as many processes were started")
    trainer = dataclasses.replace(config.trainer, devices=rank.local_world, num_nodes=rank.machines)
    return dataclasses.replace(config, trainer=trainer)


def with_precision(config: RunConfig, resumed: Path | None) -> RunConfig:
    """With what trainer.precision=auto means, which is said. A GPU computes the products of 32-true in TF32; not those
    that bf16-mixed leaves in float32, such as the distances to codes."""
    config = _with_chosen_precision(config, resumed)
    if torch.cuda.is_available() and config.trainer.precision == "32-true":
        torch.set_float32_matmul_precision("high")
    return config


def _with_chosen_precision(config: RunConfig, resumed: Path | None) -> RunConfig:
    if config.trainer.precision != "auto":
        return config
    on_gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    precision = chosen("auto", device)
    if resumed is not None:
        precision = config_of(resumed, type(config.model))["trainer"]["precision"]
    log.info("trainer.precision is %s", precision)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision=precision))


def _train(
    config: RunConfig,
    stage: BaseStage,
    folder: Path,
    preview: Batch,
    console: Console,
    metrics: Metrics,
    measure: Measure | None,
) -> L.Trainer:
    """Lightning's part: from the newest checkpoint in `folder`, if there is one, to the end of the run."""
    checkpoint = next(reversed(run_folder.checkpoints(folder)), None)
    stop = StopOnSignal(say=console.print)
    pictures, saver = Pictures(folder, preview), Checkpoints(folder, config.trainer)
    validates = config.trainer.validate_every_images
    validation = [Validation(folder, heldout_batch(config, stage))] if validates else []
    callbacks = [
        *(
            Watched(),
            StopAtEnd(),
            stop,
            metrics,
            NotFinite(folder),
            Forecast(),
            ProgressBar(console, metrics),
        ),
        *(
            *validation,
            *([Drawn(measure)] if measure else []),
            pictures,
            saver,
            Finish(config, folder, pictures, saver),
        ),
    ]
    loggers = build_loggers(config, folder, run_folder.step_of(checkpoint) if checkpoint else 0)
    trainer = build_trainer(
        config, stage, [saver.io], logger=loggers, callbacks=callbacks, default_root_dir=folder
    )
    if trainer.is_global_zero:
        run_folder.write_environment(folder, device=_device_name(trainer))
        log_config(loggers, run_to_dict(stage.config))
    try:
        run_trainer(trainer, stage, config, checkpoint)
    finally:
        stop.restore()
    return trainer


def build_trainer(
    config: RunConfig, stage: BaseStage, plugins: Sequence[Any] = (), **options: Any
) -> L.Trainer:
    """Lightning's for the run, with what is given here beside. Raises ConfigError."""
    try:
        with _without_warnings():
            return L.Trainer(
                accelerator=config.trainer.accelerator,
                devices=config.trainer.devices,
                num_nodes=config.trainer.num_nodes,
                strategy=_strategy(config, stage),
                precision=config.trainer.precision,  # type: ignore[arg-type]  # never "auto" here
                max_epochs=-1,
                plugins=[*plugins, *_environment()],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                **options,
            )
    except (MisconfigurationException, ValueError, RuntimeError) as error:  # of devices, nodes, precision
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error


def run_trainer(
    trainer: L.Trainer, stage: BaseStage, config: RunConfig, checkpoint: Path | None = None
) -> None:
    """From `checkpoint` until the trainer is told to stop. Raises UserError, and KeyboardInterrupt for Ctrl-C."""
    # Lightning's own question whether a process got SIGTERM: asked at each step, and the host waits for the answer.
    # `StopOnSignal` asks now and then.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    with _without_warnings():
        try:
            trainer.fit(stage, ShardData(config), ckpt_path=checkpoint, weights_only=True)
        except MisconfigurationException as error:
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
        except SystemExit as left:  # what Lightning makes of Ctrl-C
            if trainer.interrupted:
                raise KeyboardInterrupt from left
            raise
        finally:
            signal.signal(signal.SIGINT, on_ctrl_c)  # which Lightning switches off


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of Lightning, those that tell a person nothing."""
    with warnings.catch_warnings():
        # But for the last two, these are our intent.
        for said in ("does not have many workers", "max_epochs", "in eval mode at the start"):
            warnings.filterwarnings("ignore", message=f".*{said}.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own, on torch 2.15
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # on any login node
        yield


def num_gpus() -> int:
    """Of this machine, as far as torch can use them."""
    return torch.cuda.device_count() if torch.cuda.is_available() else int(torch.backends.mps.is_available())


def _check_devices(config: RunConfig) -> None:
    """Raises ConfigError where this machine has no such devices."""
    gpus = num_gpus()
    accelerator, devices = config.trainer.accelerator, config.trainer.devices
    found = "auto or cpu, since torch finds no GPU here"
    check(accelerator != "gpu" or gpus > 0, "trainer.accelerator", accelerator, found)
    allowed = "auto, 32-true, bf16-mixed or 64-true, on a CPU"  # Lightning would take bfloat16 in its place
    on_gpu = gpus > 0 and accelerator != "cpu"
    precision = config.trainer.precision
    check(on_gpu or precision != "16-mixed", "trainer.precision", precision, allowed)
    fits = accelerator == "cpu" or not gpus or devices <= gpus
    check(fits, "trainer.devices", devices, f"1 to {gpus}, the GPUs of this machine")


def _check_encoded(config: RunConfig, stage: BaseStage) -> None:
    """Raises DataError unless cached features are what this stage would compute."""
    for key, part in config.data.parts().items():
        if part.encoded is not None:
            features = stage.features()
            check(bool(features), f"{key}.encoded", part.encoded, f"null for stage={config.stage}")
            check_same(part.encoded, Record.read(part.encoded, Limits(config.data.deadline_s)), features)


def _initial_run(config: RunConfig) -> str | None:
    """config.init_from, with "lower" replaced by the run that it means, or by None where there is none."""
    if config.init_from != "lower":
        return config.init_from
    lower, passed_over = run_folder.newest_lower(config.runs_dir, config.stage, config.resolution.size_px)
    for run in passed_over:
        log.info("passes over %s, which did not come to its end", run)
    if lower is None:
        log.info("no lower-resolution run of %s in %s: starts from scratch", config.stage, config.runs_dir)
        return None
    log.info("continues the lower-resolution run %s", lower)
    return str(lower)


def fresh_start(config: RunConfig) -> tuple[RunConfig, LoadedCheckpoint | None]:
    """A new run's configuration, with what its init_from means, and the weights that it starts from, if any. Raises
    CheckpointError, and ConfigError where these are of another family."""
    initial = processes.from_first(lambda: _initial_run(config))
    config = dataclasses.replace(config, init_from=initial)
    if not initial:
        return config, None
    start = load(run_folder.weights_file(initial))
    found = f"{initial}, of family {start.config.get('family')}"
    check(start.config.get("family") == config.family, "init_from", found, f"a run of family {config.family}")
    return config, start


def _strategy(config: RunConfig, stage: BaseStage) -> Strategy | str:
    """Where a step has several turns, each leaves the parameters of the others without gradients."""
    if config.trainer.processes == 1:
        return "auto"
    if config.trainer.strategy != "ddp":
        return ShardedStrategy(config.trainer)
    timeout = timedelta(seconds=patience_s(config.trainer.deadline_s))
    several = len(stage.turns()) > 1
    return DDPStrategy(gradient_as_bucket_view=True, find_unused_parameters=several, timeout=timeout)


def _environment() -> list[ClusterEnvironment]:
    """What Lightning is told of the processes: those that were joined, however they were started. Its own view of SLURM
    would save and requeue in a signal's handler."""
    return [TorchElasticEnvironment()] if processes.is_joined() else []


def _device_name(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
