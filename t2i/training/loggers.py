"""metrics.csv, and the further loggers that a run writes to."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import shlex
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from t2i.config import RunConfig
from t2i.errors import ConfigError
from t2i.files import written_whole
from t2i.launch.ranks import is_first

log = logging.getLogger(__name__)
MAX_TEXT = 500  # letters of a value
MAX_WANDB_ID = 100  # of the 128 letters that wandb takes
WANDB = "wandb.json"  # in a run folder
LATER = "training goes on, and the rows are written when they can be"


class MetricsCSV(Logger):
    """One row per logged step in metrics.csv. A metric that appears later gets its column then; a resumed
    run drops the rows beyond the step it goes on from."""

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self.behind = False  # whether the file lacks rows
        self.reached = 0  # the last step of which there was a row before any was dropped
        if self.path.is_file():
            rows, damaged = _rows(self.path)
            if damaged and is_first(os.environ):
                aside = self.path.with_name(f"damaged_metrics_{time.time_ns()}.csv")
                self.path.rename(aside)
                log.warning(
                    "%d rows of %s cannot be read and are left out; it is %s now.", damaged, self.path, aside
                )
            self.reached = max((int(row["step"]) for row in rows), default=0)
            self.rows = [row for row in rows if int(row["step"]) <= from_step]
            if is_first(os.environ):  # the others see the same rows, and write none
                self._rewrite()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        known = self.rows[0].keys() if self.rows else ()
        self.rows.append(row)
        try:
            if set(row) <= set(known) and not self.behind:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, known).writerow(row)
            else:
                self._rewrite()
            self.behind = False
        except OSError as error:
            if not self.behind:
                log.warning("%s is not written: %s; %s", self.path, error.strerror, LATER)
            self.behind = True

    def _rewrite(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.rows = [{name: row.get(name, "") for name in columns} for row in self.rows]
        with written_whole(self.path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Of metrics.csv, and how many more there are that cannot be read, as after a crash of the machine. A last line
    that was cut does not count."""
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    try:
        found = list(csv.DictReader(whole))
    except csv.Error:  # not one of its fields has an end
        return [], len(whole)
    rows = [row for row in found if None not in [*row, *row.values()] and row.get("step", "").isdecimal()]
    return rows, len(found) - len(rows)


class Wandb(WandbLogger):
    """A run that is resumed repeats the steps since its checkpoint, to the bit; wandb, which takes nothing back, is
    told of each once.

    told_step: the last one that it was told of before
    """

    def __init__(self, told_step: int, **options: Any) -> None:
        super().__init__(**options)
        self.told_step = told_step

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is None or step > self.told_step:
            super().log_metrics(metrics, step)


class TensorBoard(TensorBoardLogger):
    """TensorBoard's files in `folder`/tensorboard. What a resumed run repeats takes the place of what was there before.

    from_step: the step that the run goes on from; 0 for a new one
    """

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        again: dict[str, Any] = {"purge_step": from_step + 1} if from_step else {}
        super().__init__(folder, name="", version="tensorboard", **again)
        if is_first(os.environ):
            writer = self.experiment._get_file_writer()
            writer.event_writer.close()
            writer.event_writer = EventFile(Path(writer.event_writer._file_name))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        self.experiment.flush()

    def save(self) -> None:
        """Lightning's own writes a file of hyperparameters too; they are in config.yaml."""
        self.experiment.flush()


class EventFile:
    """Takes the place of tensorboard's EventFileWriter, whose thread ends the run where the disk is full. What is
    refused is written later, from the byte on at which it stopped."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting, self.behind = path, b"", False

    def add_event(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.waiting += record.getvalue()

    def flush(self) -> None:
        try:
            with self.path.open("ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
            self.behind = False
        except OSError as error:
            if not self.behind:
                log.warning("%s is not written: %s; %s", self.path, error.strerror, LATER)
            self.behind = True

    def close(self) -> None:
        self.flush()


def build_loggers(config: RunConfig, folder: Path, from_step: int) -> list[Logger]:
    """metrics.csv first, then what config.logger asks for."""
    metrics = MetricsCSV(folder, from_step)
    loggers: list[Logger] = [metrics]
    if config.logger.tensorboard:
        loggers.append(TensorBoard(folder, from_step))
    if config.logger.wandb != "off":
        run_id, told_step = _wandb_run(folder, metrics.reached)
        try:
            loggers.append(
                Wandb(
                    told_step,
                    name=f"{config.stage}-{config.resolution.size_px}-{folder.name}-s{config.seed}",
                    group=config.stage,
                    project=config.logger.wandb_project,
                    save_dir=folder,
                    offline=config.logger.wandb == "offline",
                    id=run_id,
                    resume="allow",
                )
            )
        except ModuleNotFoundError as error:
            raise ConfigError("logger.wandb needs the package wandb: pip install 't2i[wandb]'.") from error
    return loggers


def log_config(loggers: Iterable[Logger], config: Mapping[str, Any]) -> None:
    """The configuration for wandb's table of runs and TensorBoard's hyperparameters, so that runs can be compared by
    it. Long lists (of shards) are cut. Raises ConfigError where wandb takes nobody."""
    flat = dict(_flat(config))
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            from torch.utils.tensorboard.summary import hparams

            writer = logger.experiment._get_file_writer()
            for part in hparams(
                flat, {"loss": 0.0}
            ):  # which metric to show beside them; its values are those logged
                writer.add_summary(part)
            writer.flush()
        elif isinstance(logger, WandbLogger):
            from wandb.errors import Error

            try:
                logger.experiment.config.update(flat, allow_val_change=True)
            except Error as error:  # no account, no network
                said = " ".join(str(error).split()).rstrip(".")
                raise ConfigError(
                    f"logger.wandb is 'online': {said}; logger.wandb=offline needs neither account nor network."
                ) from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**53):
            yield prefix + key, value
        else:
            yield prefix + key, _shortened(str(value))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."


def sync_command(folder: Path) -> str:
    """What brings an offline run to wandb; of one that was stopped and resumed all parts, in order, into one run."""
    return f"wandb sync --id {_wandb_run(folder)[0]} {shlex.quote(str(folder / 'wandb'))}/offline-run-*"


def _wandb_run(folder: Path, reached: int = 0) -> tuple[str, int]:
    """The id of a run folder's one run at wandb, whichever start this is, and the last step that wandb was told of
    before; both are kept in the folder.

    reached: the last step that the start before this one logged
    """
    path = folder / WANDB
    try:
        kept = json.loads(path.read_text())
        run_id, told = str(kept["id"]), int(kept["told_step"])
    except (OSError, ValueError, KeyError, TypeError):
        run_id, told = _wandb_id(folder), 0
        if not (folder / "wandb").is_dir():  # else of a version that had no such file
            run_id += f"-{uuid.uuid4().hex[:8]}"  # runs of other people and machines may have the same name
    told = max(told, reached)
    if is_first(os.environ):
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps({"id": run_id, "told_step": told}) + "\n")
    return run_id, told


def _wandb_id(folder: Path) -> str:
    """The folder's name, in the letters that wandb allows."""
    name = f"{folder.parent.name}-{folder.name}"
    plain = "".join(c if (c.isascii() and c.isalnum()) or c in "-_" else "-" for c in name)
    if plain == name and len(name) <= MAX_WANDB_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: MAX_WANDB_ID - 9]}-{digest}"
