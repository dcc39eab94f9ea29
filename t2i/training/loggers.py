"""metrics.csv, and the further loggers that a run writes to."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from t2i.config import RunConfig
from t2i.errors import ConfigError


class MetricsCSV(Logger):
    """One row per logged step in metrics.csv. A metric that appears later gets its column then; a resumed
    run drops the rows beyond the step it goes on from."""

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= from_step]
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
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def build_loggers(config: RunConfig, folder: Path, from_step: int) -> list[Logger]:
    """metrics.csv first, then what config.logger asks for."""
    loggers: list[Logger] = [MetricsCSV(folder, from_step)]
    if config.logger.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if config.logger.wandb != "off":
        try:
            from lightning.pytorch.loggers import WandbLogger

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


def _wandb_id(folder: Path) -> str:
    """An id that a resumed run finds again: the folder's name, in the letters wandb allows."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in f"{folder.parent.name}-{folder.name}")
