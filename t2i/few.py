"""Numbers of things in messages, and a few of what there may be a million of."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

FEW = 10


class FewOfEach:
    """Logs the first few messages of each kind, each once, and of the rest their number whenever it is ten times what
    was said last."""

    def __init__(self, logger: logging.Logger) -> None:
        self._log = logger
        self._counts: Counter[str] = Counter()
        self._said: set[str] = set()

    def __call__(self, level: int, kind: str, message: str) -> None:
        if message in self._said:
            return
        self._counts[kind] += 1
        count = self._counts[kind]
        if count <= FEW:
            self._said.add(message)
            self._log.log(level, "%s", message)
        elif count >= 10 * FEW and set(str(count)[1:]) == {"0"} and str(count)[0] == "1":
            self._log.log(level, "%s: %s by now, of which the first %d were named", kind, f"{count:,}", FEW)


def first_few(lines: Sequence[str]) -> Iterator[str]:
    """The first few of `lines`, and how many more there are."""
    yield from lines[:FEW]
    if len(lines) > FEW:
        yield f"... and {len(lines) - FEW:,} more"


def plural(count: int, one: str, many: str = "") -> str:
    """ "1 shard", "1,234 shards": a number and its noun. many: of other numbers, where that is not `one` and an s"""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"
