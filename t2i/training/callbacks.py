"""What happens around a train step: progress, metrics, pictures, and a clean stop."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from t2i.few import plural
from t2i.interfaces import Batch
from t2i.launch import processes, signals
from t2i.launch.ranks import Rank
from t2i.launch.watch import doing
from t2i.nn.precision import widened
from t2i.training.pictures import grid, save_png, to_uint8
from t2i.training.stage import BaseStage

log = logging.getLogger(__name__)


def crossed(images_seen: int, images_per_step: int, every_images: int) -> bool:
    """Whether the step that ended at `images_seen` passed a multiple of `every_images` (0: never)."""
    return (
        bool(every_images) and images_seen // every_images > (images_seen - images_per_step) // every_images
    )


@contextmanager
def looking(trainer: L.Trainer, stage: BaseStage) -> Iterator[None]:
    """Within it the stage draws and measures: in evaluation mode, without gradients, with the averaged weights and in
    the run's precision."""
    was_training = stage.training
    stage.eval()
    with torch.no_grad(), stage.averaged_weights(), trainer.precision_plugin.forward_context():
        yield
    stage.train(was_training)


class Watched(Callback):
    """Tells the watch over the processes how many steps are done; its place is before all others. Where it was
    Lightning that started the processes, they are watched over from here on."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.world_size > 1:
            rank = Rank(trainer.global_rank, trainer.world_size, trainer.local_rank)
            children = getattr(trainer.strategy.launcher, "procs", ())
            processes.watch_over(os.environ, rank, pl_module.config.trainer.deadline_s, children)

    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        doing("begins", stage.steps_done)

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        doing("after the step", stage.steps_done)


class StopAtEnd(Callback):
    """Ends the fit when trainer.num_images were seen; that of a run that is resumed complete, before its first step."""

    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        trainer.should_stop = stage.is_complete

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if stage.is_complete:
            trainer.should_stop = True


class Metrics(Callback):
    """Averages each metric over log_every_steps on the device, then over the processes, and sends it to every
    logger with the step, the images seen, the epochs of each dataset, the speed, the share of the time in which steps
    waited for their batches, the steps left out so far and the bad samples by cause. Of a GPU also the most memory that
    tensors took so far, in the first process, and where its peak is known the MFU. Steps that are left out do not count
    in the averages. Processes and host wait for one another only then. An epoch that had bad samples is said when it is
    over.

    mfu_per_rate: share of a GPU's peak FLOP/s that one picture per second on it means
    """

    def __init__(self, mfu_per_rate: float | None = None) -> None:
        self.mfu_per_rate = mfu_per_rate
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}  # of steps that were not left out
        self.bad: dict[str, int] = {}
        self.reported: Counter[str] = Counter()  # of the bad ones, in epochs that are over
        self.epochs: dict[str, float] = {}
        self.since = (time.perf_counter(), 0)
        self.latest: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        self.since = (time.perf_counter(), stage.images_seen)
        trainer.train_dataloader.waiting.waits.clear()  # type: ignore[union-attr]  # before the first step

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        for name, value in stage.metrics.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(stage.skipped.last, 0.0, value)
            self.counts[name] = self.counts.get(name, 0) + (~stage.skipped.last).int()
        for cause, count in batch.bad.items():
            self.bad[cause] = self.bad.get(cause, 0) + count
        if stage.steps_done % stage.config.trainer.log_every_steps:
            return
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        skipped = int(stage.skipped.total)
        now, (then, images_then) = time.perf_counter(), self.since  # a GPU has done all of it by now
        rate = (stage.images_seen - images_then) / (now - then)
        waited_s = trainer.train_dataloader.waiting.take_s()  # type: ignore[union-attr]
        means["data_wait"] = torch.tensor(waited_s / (now - then), device=stage.device)
        doing("logs")
        self.latest = mean_over_processes(means)
        if stage.device.type == "cuda":
            self.latest["peak_memory_gib"] = torch.cuda.max_memory_allocated(stage.device) / 2**30
        if self.mfu_per_rate is not None:
            self.latest["mfu"] = self.mfu_per_rate * rate / trainer.world_size
        bad = sum_over_processes(self.bad)
        epochs = trainer.train_dataloader.epochs(stage.images_seen)  # type: ignore[union-attr]
        self.report(epochs, Counter(bad))
        values = {
            "images": stage.images_seen,
            **{f"epoch_{name}" if name else "epoch": count for name, count in epochs.items()},
            **self.latest,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": rate,
            **({"skipped_steps": skipped} if skipped else {}),
            **{f"bad_{cause}": count for cause, count in bad.items()},
        }
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=stage.steps_done)
        self.sums, self.counts, self.since = {}, {}, (now, stage.images_seen)

    def report(self, epochs: dict[str, float], bad: Counter[str]) -> None:
        """Says what was bad in the epochs that ended since the last call."""
        over = [name for name, count in epochs.items() if int(count) > int(self.epochs.get(name, count))]
        self.epochs = epochs
        if over and (new := bad - self.reported):
            ended = ", ".join(f"{int(epochs[name])}{f' of {name}' if name else ''}" for name in over)
            table = ", ".join(f"{cause}: {count}" for cause, count in new.most_common())
            log.info(
                "epoch %s is over; bad samples since the last report: %d (%s)", ended, new.total(), table
            )
            self.reported = bad


def mean_over_processes(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """On the device () or (2,), a sum and a count; the same names in every process -> their means, on the host. What
    has a count of zero is left out."""
    means = torch.cat([widened(value).view(-1) for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(means)
        means /= dist.get_world_size()
    found, numbers = dict[str, float](), iter(means.tolist())
    for name, value in values.items():
        total, count = next(numbers), next(numbers) if value.ndim else 1.0
        if count:
            found[name] = total / count
    return found


def told(latest: dict[str, float]) -> str:
    """What the bar says of the metrics that were logged last."""
    forms = {
        "loss": "loss {:.4f}",
        "gradient_norm": "gradient {:.3g}",
        "mfu": "MFU {:.1%}",
        "data_wait": "waits for data {:.0%}",
        "peak_memory_gib": "{:.1f} GiB",
    }
    return ", ".join(form.format(latest[name]) for name, form in forms.items() if name in latest)


def sum_over_processes(counts: dict[str, int]) -> dict[str, int]:
    """Counts by name, where not every process has counted every name -> their sums."""
    gathered = [counts]
    if dist.is_initialized():
        gathered *= dist.get_world_size()
        dist.all_gather_object(gathered, counts)
    return dict(sum((Counter(part) for part in gathered), Counter()))


class Forecast(Callback):
    """Says how long the run will take, from its first steps: after one step where that is slow, else from the last five
    of ten (the first ones of a run are slower than the rest). Captions that are kept once they are encoded take their
    time in a process's first pass over the samples alone."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.steps = 0
        self.encoded_s = 0.0  # what the text encoder had taken at `began`

    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        if stage.is_complete:
            return
        left = stage.config.trainer.num_images - stage.images_seen
        size = stage.config.resolution.size_px
        log.info("%d images to go at %d px on %s; the first steps tell how long", left, size, stage.device)
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.began is None:
            return
        self.steps += 1
        if self.steps not in (1, 5, 10):
            return
        if stage.device.type == "cuda":
            torch.cuda.synchronize(stage.device)  # else a step's time is that of queueing it
        now, steps, text = time.perf_counter(), 5 if self.steps == 10 else 1, stage.cached_text
        encoded_s = 0.0 if text is None else text.encoding_s
        seconds, encoding = (now - self.began) / steps, (encoded_s - self.encoded_s) / steps
        self.began, self.encoded_s = now, encoded_s
        if self.steps == 10 or (self.steps == 1 and seconds > 2):
            images = max(0, stage.config.trainer.num_images - stage.images_seen)
            left = images / stage.images_per_step
            still = 1.0  # share of the steps to come in which captions are encoded
            if encoding and text.keeps(samples := trainer.train_dataloader.num_samples):  # type: ignore[union-attr]
                still = min(1.0, max(0.0, samples / len(batch) - self.steps) / max(1.0, left))
            step_s = seconds - encoding * (1 - still)
            if left * step_s >= 1:
                log.info("about %s at %.1f s a step; Ctrl-C saves and stops", duration(left * step_s), step_s)
            self.began = None


def duration(seconds: float) -> str:
    """A length of time in the unit a person would use: "40 seconds", "12 minutes", "3.5 hours", "9.1 days"."""
    for size, unit in ((86_400, "days"), (3_600, "hours")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"


class ProgressBar(Callback):
    """A bar in images with images/s, time left and what was logged last; a line each minute where there is no
    terminal."""

    def __init__(self, console: Console, metrics: Metrics) -> None:
        self.console, self.metrics = console, metrics
        self.progress: Progress | None = None
        self.last_line = 0.0

    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        self.last_line = time.monotonic()
        if not (trainer.is_global_zero and self.console.is_terminal):
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TextColumn("{task.fields[rate]:.0f}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
            console=self.console,
        )
        description = f"{stage.config.stage} {stage.config.resolution.size_px}px"
        total, done = stage.config.trainer.num_images, stage.images_seen
        self.task = self.progress.add_task(description, total=total, completed=done, rate=0.0, told="")
        self.progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self.progress is not None:
            rate = self.progress.tasks[0].speed or 0.0
            done = min(stage.images_seen, stage.config.trainer.num_images)
            self.progress.update(self.task, completed=done, rate=rate, told=told(self.metrics.latest))
        elif trainer.is_global_zero and time.monotonic() - self.last_line > 60:
            self.last_line = time.monotonic()
            progress = f"{stage.images_seen:,} of {plural(stage.config.trainer.num_images, 'image')}"
            self.console.print(", ".join(filter(None, [progress, told(self.metrics.latest)])))

    def on_train_end(self, trainer: L.Trainer, stage: Any) -> None:
        self.close()

    def on_exception(self, trainer: L.Trainer, stage: Any, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


class Pictures(Callback):
    """samples/<name>_<step>.png every sample_every_images, also to TensorBoard and wandb. The last ones are drawn when
    the run is complete (see `Finish`)."""

    def __init__(self, folder: Path, batch: Batch) -> None:
        self.folder, self.batch = folder, batch

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        every = stage.config.trainer.sample_every_images
        if crossed(stage.images_seen, stage.images_per_step, every) and not stage.is_complete:
            self.draw(trainer, stage)

    def draw(self, trainer: L.Trainer, stage: BaseStage) -> None:
        """Draws with the averaged weights. All processes draw, since the model may be spread over them; the
        first writes."""
        doing("draws")
        batch = self.batch.to(stage.device, stage.weight_dtype)
        with looking(trainer, stage):
            drawn = stage.draw(batch)
        if not trainer.is_global_zero:
            return
        for name, images in drawn.items():
            sheet = grid(images, columns=8)
            path = self.folder / "samples" / f"{name}_{stage.steps_done:06d}.png"
            try:
                save_png(sheet, path)
            except OSError as error:  # as of checkpoints: there may be room for the next one
                log.warning("%s is not written: %s; training goes on", path, error.strerror)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(name, to_uint8(sheet), stage.steps_done)
                elif isinstance(logger, WandbLogger):
                    logger.log_image(name, [to_uint8(sheet).permute(1, 2, 0).numpy()], step=stage.steps_done)


class StopOnSignal(Callback):
    """Ctrl-C (or SIGTERM, SIGUSR1) ends the fit after the step in progress, or where there are several processes after
    the next one in which they ask one another, so that all end at the same step; a second Ctrl-C ends it at once. The
    handler only sets a flag: saving inside it would lose the batch in flight."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    SECONDS = 2.0  # between two steps in which processes wait for one another to ask

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.received: int | None = None
        self.stopped = False
        self.previous: dict[int, Any] = {}
        self.asked = (0, 0.0)  # in which step, and when
        self.next = 0  # step in which to ask; the same in all processes

    def on_train_start(self, trainer: L.Trainer, stage: Any) -> None:
        self.asked = (stage.steps_done, time.perf_counter())
        self.received = signals.received
        for number in self.SIGNALS:
            self.previous[number] = signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        self.say("Stopping after this step, to save. Press Ctrl-C again to stop without saving.")

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        received = self.received is not None
        if trainer.world_size > 1:
            if stage.steps_done < self.next:
                return
            now, (step, then) = time.perf_counter(), self.asked
            seconds = (now - then) / max(stage.steps_done - step, 1)
            doing("asks whether to stop")
            answers = torch.tensor([float(received), seconds], device=stage.device)
            dist.all_reduce(answers, op=dist.ReduceOp.MAX)
            received, seconds = answers.tolist()  # the host waits here
            self.asked = (stage.steps_done, time.perf_counter())
            self.next = stage.steps_done + max(1, int(self.SECONDS / max(seconds, 1e-3)))
        if received:
            self.stopped = trainer.should_stop = True

    def restore(self) -> None:
        """Gives the signals back to their former handlers, where that was not done already: Lightning's would ask the
        other processes, which may be gone."""
        for number, handler in self.previous.items():
            if signal.getsignal(number) == self.handle:
                signal.signal(number, handler)
