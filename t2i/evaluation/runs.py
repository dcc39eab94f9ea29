"""The runs of a report: where they are, what they are called, and the pictures that they are judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.config import DataConfig, parse
from t2i.data.reader import read_all
from t2i.errors import DataError
from t2i.interfaces import Batch
from t2i.training.run_folder import read_config, read_summary

LEFT_OUT = (
    "which is left out: it is no run folder here, draws nothing for prompts, or has no held-out pictures"
)


@dataclass(frozen=True)
class Origin:
    """A run that draws for prompts, and what was trained before it.

    continues: the run whose weights it began with
    codec: the run folder of the codec that it builds on
    left_out: what of these its configuration names and a report cannot show
    low: the run at a lower resolution whose codes it is given
    """

    folder: Path
    continues: Origin | None = None
    codec: Path | None = None
    left_out: tuple[str, ...] = ()
    low: Origin | None = None

    def ladder(self) -> list[Origin]:
        """The runs that it continues, the first one first, those that it is given codes by, and itself."""
        before = [one for each in (self.continues, self.low) if each for one in each.ladder()]
        return list({one.folder: one for one in (*before, self)}.values())

    def draws_with(self) -> list[Path]:
        """The runs whose weights it draws with, each once."""
        own = [path for path in (self.folder, self.codec) if path is not None]
        return list(dict.fromkeys([*own, *(self.low.draws_with() if self.low else [])]))

    def folders(self) -> list[Path]:
        """All runs that it took, each once."""
        each = [path for one in self.ladder() for path in (one.codec, one.folder) if path is not None]
        return list(dict.fromkeys(each))


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and resolved configuration.

    label: stage and size, such as "ldm-64"; where several runs have the same, with the folder's name
    """

    folder: Path
    config: dict[str, Any]
    label: str

    @classmethod
    def read_all(cls, folders: Iterable[Path]) -> list[Run]:
        configs = {folder: read_config(folder) for folder in folders}
        return [
            cls(folder, config, label)
            for (folder, config), label in zip(configs.items(), _labels(configs), strict=True)
        ]

    @property
    def stage(self) -> str:
        return self.config["stage"]

    @property
    def size_px(self) -> int:
        return self.config["resolution"]["size_px"]

    @property
    def title(self) -> str:
        """Its heading, such as "ldm at 64 px"."""
        name = self.label.removeprefix(f"{self.stage}-{self.size_px}").removeprefix("-")
        return f"{self.stage} at {self.size_px} px" + (f" ({name})" if name else "")

    @property
    def seconds(self) -> float | None:
        """Of training; None for a run that was killed, or came from elsewhere."""
        return read_summary(self.folder).get("seconds")

    def heldout(self, size_px: int, limit: int | None = None) -> Batch:
        return self._read("heldout_shards", size_px, limit)

    def train(self, size_px: int, limit: int | None = None) -> Batch:
        return self._read("shards", size_px, limit)

    def _read(self, key: str, size_px: int, limit: int | None = None) -> Batch:
        data = parse(DataConfig, self.config["data"], "data.")
        shards = getattr(data, key)
        if not shards:
            raise DataError(f"{self.folder} was trained without data.{key}; a report needs them.")
        return read_all(data, shards, size_px, limit)


def _labels(configs: dict[Path, dict[str, Any]]) -> list[str]:
    """Of each run, no two alike."""
    plain = [f"{config['stage']}-{config['resolution']['size_px']}" for config in configs.values()]
    named = [
        f"{label}-{folder.name}" if plain.count(label) > 1 else label
        for label, folder in zip(plain, configs, strict=True)
    ]
    return [
        f"{label}-{1 + named[:i].count(label)}" if named.count(label) > 1 else label
        for i, label in enumerate(named)
    ]


def prompts_hash(captions: Sequence[str]) -> str:
    """Tells sets of prompts apart."""
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()[:12]
