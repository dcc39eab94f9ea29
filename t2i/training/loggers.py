"""metrics.csv, and the further loggers that a run writes to."""

from __future__ import annotations

import csv
import hashlib
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from t2i.config import RunConfig
from t2i.errors import ConfigError
from t2i.files import written_whole

MAX_TEXT = 500  # letters of a value
MAX_WANDB_ID = 100  # of the 128 letters that wandb takes


class MetricsCSV(Logger):
    """One row per logged step in metrics.csv. A metric that appears later gets its column then; a resumed
    run drops the rows beyond the step it goes on from."""

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a crash may have cut the last one
            self.rows = [row for row in csv.DictReader(whole) if int(row["step"]) <= from_step]
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
        if set(row) <= set(known):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, known).writerow(row)
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.rows = [{name: row.get(name, "") for name in columns} for row in self.rows]
        with written_whole(self.path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def build_loggers(config: RunConfig, folder: Path, from_step: int) -> list[Logger]:
    """metrics.csv first, then what config.logger asks for."""
    loggers: list[Logger] = [MetricsCSV(folder, from_step)]
    if config.logger.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if config.logger.wandb != "off":
        try:
            loggers.append(
                WandbLogger(
                    name=f"{config.stage}-{config.resolution.size_px}-{folder.name}-s{config.seed}",
                    group=config.stage,
                    project=config.logger.wandb_project,
                    save_dir=folder,
                    offline=config.logger.wandb == "offline",
                    id=_wandb_id(folder),
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
    return f"wandb sync --id {_wandb_id(folder)} {shlex.quote(str(folder / 'wandb'))}/offline-run-*"


def _wandb_id(folder: Path) -> str:
    """An id that a resumed run finds again, and no other run has: the folder's name, in the letters wandb allows."""
    name = f"{folder.parent.name}-{folder.name}"
    plain = "".join(c if (c.isascii() and c.isalnum()) or c in "-_" else "-" for c in name)
    if plain == name and len(name) <= MAX_WANDB_ID:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: MAX_WANDB_ID - 9]}-{digest}"
