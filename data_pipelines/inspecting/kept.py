"""What was found of each shard, in a file of its own: looked at by several jobs, put together by one."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t2i.config import TextConfig
from t2i.errors import DataError
from t2i.files import written_whole

from ..shard_metadata import identity
from .facts import Facts

VERSION = 1


@dataclass
class ShardFacts:
    """Of one shard.

    bytes: of its file; rows: of its index, samples: those that are real; keys: (samples,) uint64 digests
    facts: of its rows, in parts and in order; what is counted once stays in the order in which it was met
    whole: every part could be read
    """

    bytes: int
    rows: int
    samples: int
    keys: np.ndarray
    facts: list[Facts] = field(default_factory=list)
    whole: bool = True


class Kept:
    """Files in `folder`, each of a shard and of how it was looked at."""

    def __init__(self, folder: Path, fast: bool, text: TextConfig | None) -> None:
        self.folder = folder
        self.how = {
            "version": VERSION,
            "fast": fast,
            "text": None if text is None else dataclasses.asdict(text),
        }

    def read(self, url: str) -> ShardFacts | None:
        """None where the shard has not been looked at so, is another one now, or cannot be read."""
        try:
            found = json.loads(self._place(url).read_text())
            if found.pop("made_of") != self._made_of(url):
                return None
        except (OSError, ValueError, DataError):
            return None
        found["keys"] = np.frombuffer(base64.b64decode(found["keys"]), dtype=np.uint64)
        found["facts"] = [_facts(each) for each in found["facts"]]
        return ShardFacts(**found)

    def write(self, url: str, shard: ShardFacts) -> None:
        values = {
            "made_of": self._made_of(url),
            "bytes": shard.bytes,
            "rows": shard.rows,
            "samples": shard.samples,
            "keys": base64.b64encode(shard.keys.tobytes()).decode(),
            "facts": [_plain(each) for each in shard.facts],
        }
        with written_whole(self._place(url)) as unfinished:
            unfinished.write_text(json.dumps(values))

    def _place(self, url: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}.json"

    def _made_of(self, url: str) -> dict[str, Any]:
        return {**self.how, "shard": identity(url)}


def _plain(facts: Facts) -> dict[str, Any]:
    """Counters as lists of pairs: their keys may be numbers, and have an order."""
    values = vars(facts) | {"lists": [[name, _pairs(counts)] for name, counts in facts.lists.items()]}
    return {name: _pairs(value) if isinstance(value, Counter) else value for name, value in values.items()}


def _pairs(counts: Counter[Any]) -> list[list[Any]]:
    return [[key, count] for key, count in counts.items()]


def _facts(values: dict[str, Any]) -> Facts:
    counters = {each.name for each in dataclasses.fields(Facts) if each.default_factory is Counter}
    known: dict[str, Any] = {
        name: Counter(dict(value)) if name in counters else value for name, value in values.items()
    }
    known["lists"] = {name: Counter(dict(counts)) for name, counts in values["lists"]}
    return Facts(**known)
