"""Where the time of a train step goes: a few steps under torch.profiler, of which nothing stays."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from t2i.config import RunConfig, check
from t2i.errors import TrainingError
from t2i.files import written_whole
from t2i.interfaces import Batch
from t2i.launch import processes
from t2i.training.fit import build_stage, build_trainer, fresh_start, run_trainer, set_up, with_precision
from t2i.training.ranges import PARTS, PREFIX
from t2i.training.stage import BaseStage

WARM_UP = 3  # steps that are left out: kernels are chosen, memory is claimed, the optimizer's state is made
EXCHANGES = ("gloo:", "nccl")  # in the names of what processes do together


@dataclass(frozen=True)
class Profile:
    """Of the first process.

    milliseconds: of one step, by part: PARTS, "communication" (the part of the backward pass in which it alone goes on)
        and "the rest"; they add up to the step
    trace: for Perfetto and Chrome
    device: that ran the steps
    """

    milliseconds: dict[str, float]
    trace: Path
    device: str


def profile(config: RunConfig, stage_class: type[BaseStage], steps: int, folder: Path) -> Profile:
    """Trains a few steps to warm up and then `steps` more, as they are at the end of the run, and writes
    folder/trace.json; no run is left. The parts are timed one after another: at their ends the host waits for what a
    GPU has to do. Raises UserError as `fit` does."""
    check(config.resume is None, "resume", config.resume, "null, as a profile goes on from no run")
    config = with_precision(set_up(config), resumed=None)
    L.seed_everything(config.seed % 2**32, verbose=False)
    config, start = fresh_start(config)
    stage = build_stage(config, stage_class, start)
    _set_at_end(stage, WARM_UP + steps)
    profiled = _Profiled(steps)
    trainer = build_trainer(config, stage, logger=False, callbacks=[profiled])
    run_trainer(trainer, stage, config)
    trace = folder / "trace.json"
    if trainer.is_global_zero:
        try:
            with written_whole(trace) as unfinished:
                profiled.profiler.export_chrome_trace(str(unfinished))
        except OSError as error:
            raise TrainingError(f"{trace} cannot be written: {error.strerror}.") from error
    found = Profile(profiled.milliseconds(), trace, stage.device.type)
    processes.leave()
    return found


def _set_at_end(stage: BaseStage, steps: int) -> None:
    """So many steps before the end of its run: what begins on the way, such as a discriminator, takes part then."""
    trainer = stage.config.trainer
    size = trainer.images_per_process * trainer.processes
    stage.steps_done = max(0, trainer.num_images // size - steps)
    stage.images_seen = stage.steps_done * size


class _Profiled(Callback):
    """Runs the profiler over `steps` steps after WARM_UP, and ends the fit."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0
        self.began = self.seconds = 0.0
        devices = ["CPU", "CUDA"] if torch.cuda.is_available() else ["CPU"]
        self.profiler = torch.profiler.profile(
            activities=[getattr(torch.profiler.ProfilerActivity, each) for each in devices]
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.done += 1
        if self.done not in (WARM_UP, WARM_UP + self.steps):
            return
        if stage.device.type == "cuda":
            torch.cuda.synchronize(stage.device)
        if self.done == WARM_UP:
            self.profiler.start()
            self.began = time.perf_counter()
        else:
            self.seconds = time.perf_counter() - self.began
            self.profiler.stop()
            trainer.should_stop = True

    def milliseconds(self) -> dict[str, float]:
        """As `Profile` has them."""
        events = list(self.profiler.events())
        cpu = torch.autograd.DeviceType.CPU
        ranges = {
            part: [e for e in events if e.name == PREFIX + part and e.device_type == cpu] for part in PARTS
        }
        total = {part: sum(_us(each) for each in ranges[part]) for part in PARTS}
        exchanged = _exchanged_alone_us(events, ranges["backward"])
        total |= {"backward": total["backward"] - exchanged, "communication": exchanged}
        total["the rest"] = self.seconds * 1e6 - sum(total.values())
        return {part: us / self.steps / 1000 for part, us in total.items()}


def _us(event: Any) -> float:
    return event.time_range.end - event.time_range.start


def _exchanged_alone_us(events: Iterable[Any], ranges: Sequence[Any]) -> float:
    """Within `ranges`, where an exchange between processes goes on and nothing is computed: on a GPU by its kernels,
    else by the operations of the thread of the ranges."""
    cuda = torch.autograd.DeviceType.CUDA
    of_gpu = [each for each in events if each.device_type == cuda]
    threads = {each.thread for each in ranges}
    exchanges, computing = [], []
    for event in of_gpu or events:
        span = (event.time_range.start, event.time_range.end)
        if any(name in event.name for name in EXCHANGES) and not (of_gpu and event.is_user_annotation):
            exchanges.append(span)
        elif not event.is_user_annotation and (of_gpu or event.thread in threads):
            computing.append(span)
    if not exchanges:
        return 0.0
    return sum(_covered(each, exchanges + computing) - _covered(each, computing) for each in ranges)


def _covered(within: Any, spans: Iterable[tuple[float, float]]) -> float:
    """How much of the time of `within` the spans cover together."""
    covered, at, last = 0.0, within.time_range.start, within.time_range.end
    for start, end in sorted(spans):
        start, end = max(start, at), min(end, last)
        if end > start:
            covered, at = covered + end - start, end
    return covered
