"""What is in shards: sizes, formats, captions and flaws, and some samples for a contact sheet."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import multiprocessing
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from t2i.config import TextConfig
from t2i.data.index import ShardIndex
from t2i.data.sources import is_local, local_path
from t2i.errors import DataError, sentence
from t2i.few import plural
from t2i.launch.ranks import ALONE, Rank

from ..processes import leave_interrupts
from ..shard_metadata import local_copy
from .facts import ASPECT_EDGES, Facts, Tile, look_at
from .kept import Kept, ShardFacts

ROWS_PER_TASK = 128
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LARGE_PX = (256, 512, 1024)


@dataclass
class Report:
    """bytes, shard_samples: of each shard that could be read; unreadable: shard -> why
    repeated_keys: samples whose key an earlier sample has, in whichever shard
    tiles: for the contact sheet, in the order of the shards"""

    facts: Facts = field(default_factory=Facts)
    bytes: list[int] = field(default_factory=list)
    shard_samples: list[int] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    repeated_keys: int = 0
    tiles: list[Tile] = field(default_factory=list)

    def add(self, shard: ShardFacts) -> None:
        """A shard, as far as it was looked at."""
        self.bytes.append(shard.bytes)
        self.shard_samples.append(shard.samples)
        for facts in shard.facts:
            self.facts.add(facts)

    def to_json(self) -> dict[str, Any]:
        facts = self.facts
        return {
            "shards": {
                "read": len(self.bytes),
                "unreadable": self.unreadable,
                "bytes": sum(self.bytes),
                "samples": percentiles(Counter(self.shard_samples), (0, 50, 100)),
            },
            "samples": facts.samples,
            "pictures": facts.pictures,
            "members": dict(facts.members.most_common()),
            "formats": dict(facts.formats.most_common()),
            "shorter_side_px": {"stored": sizes(facts.stored_px), "original": sizes(facts.original_px)},
            "aspect_ratio": {name: facts.aspects[i] for i, name in enumerate(aspect_names())},
            "caption": {
                "found": facts.characters.total(),
                "characters": percentiles(facts.characters),
                "words": percentiles(facts.words),
                "tokens": percentiles(facts.tokens),
                "texts_per_json_list": {
                    name: {"known": counts.total(), **percentiles(counts)}
                    for name, counts in facts.lists.items()
                },
            },
            "repeated_keys": self.repeated_keys,
            "flaws": {
                cause: {"samples": count, "first": facts.named[cause]}
                for cause, count in facts.causes.most_common()
            },
        }


def aspect_names() -> list[str]:
    edges = [f"{edge:g}" for edge in ASPECT_EDGES]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    return [f"under {edges[0]}", *between, f"{edges[-1]} and more"]


def percentiles(counts: Counter[int], shares: Sequence[int] = PERCENTILES) -> dict[str, int]:
    """The smallest value that at least so many percent do not exceed; {} of nothing."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    reached = np.cumsum([counts[value] for value in values.tolist()])
    ranks = np.ceil(np.array(shares) / 100 * reached[-1])
    return {
        f"p{share}": int(value)
        for share, value in zip(shares, values[np.searchsorted(reached, ranks)], strict=True)
    }


def sizes(shorter_px: Counter[int]) -> dict[str, float]:
    """Percentiles, and the shares that reach LARGE_PX."""
    total = shorter_px.total()
    shares = {
        f"share_from_{px}": round(sum(n for side, n in shorter_px.items() if side >= px) / total, 4)
        for px in LARGE_PX
        if total
    }
    return {"known": total, **percentiles(shorter_px), **shares}


def inspect_shards(
    urls: Sequence[str],
    fast: bool,
    num_tiles: int,
    tile_px: int,
    seed: int,
    workers: int,
    progress: Callable[[float], None],
    text: TextConfig | None = None,
    parts: Path | None = None,
    rank: Rank = ALONE,
) -> Report:
    """Reads shards with `workers` processes. Memory does not grow with the data, but for 8 bytes a sample that
    find repeated keys.

    fast: believe the pictures' headers instead of decoding every picture
    num_tiles: samples for the contact sheet, chosen by `seed` with equal chances, whatever `workers` is
    progress: called with the part of a shard that was done
    text: count the tokens of captions for this encoder, and the captions that it would cut
    parts: a folder for what is found of each shard; a shard that is there is not looked at again
    rank: of several processes each looks at its share alone, for `parts`; who calls alone after them has all
    Raises DataError where no shard can be read, or a picture kills the process that decodes it.
    """
    report, choice = Report(), _Choice(num_tiles if rank.world == 1 else 0, seed)
    keys: list[np.ndarray] = []
    kept = None if parts is None else Kept(parts, fast, text)
    # spawned: a fork of a process that has threads can wait for ever
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start) as pool:
        tasks = _Tasks(pool, report, choice, fast, tile_px, 4 * workers, progress, text, kept)
        for number, url in enumerate(urls):
            if number % rank.world != rank.rank:
                continue
            if kept is not None and (known := kept.read(url)) is not None:
                tasks.finish()  # those before come first
                report.add(known)
                keys.append(known.keys)
                choice.draw(number, known.rows)
                progress(1)
                continue
            with contextlib.ExitStack() as stack:
                try:
                    path = stack.enter_context(local_copy(url))
                    with path.open("rb") as file:
                        index = ShardIndex.scan(url, file.fileno())
                except Exception as error:  # tarfile raises nearly anything on bytes that are no tar file
                    report.unreadable[url] = sentence(error)
                    progress(1)
                    continue
                real = [row for row in range(len(index)) if (index.offsets[row] >= 0).any()]
                digests = _digests(index.keys[row] for row in real if index.flaws.get(row) != "duplicate")
                shard = ShardFacts(index.file_bytes, len(index), len(real), digests)
                report.add(shard)
                keys.append(digests)
                tasks.submit(path, url, index, number, shard)
                if not is_local(url) or path != local_path(url):
                    tasks.finish()  # before the copy goes
        tasks.finish()
        for number, rows in choice.unseen().items():
            choice.put(number, _tiles_of(pool, urls[number], rows, fast, tile_px))
    if not report.bytes and rank.world > 1:
        return report
    if not report.bytes:
        first = next(iter(report.unreadable.values()))
        raise DataError(f"None of {plural(len(urls), 'shard')} can be read; of the first: {first}")
    all_keys = np.concatenate(keys)
    report.repeated_keys = len(all_keys) - len(np.unique(all_keys))
    report.tiles = choice.tiles()
    return report


class _Choice:
    """Each sample draws a number; those with the smallest stay."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._heap: list[tuple[float, int, int]] = []  # of (-number, shard, row)
        self._tiles: dict[tuple[int, int], Tile] = {}

    def draw(self, shard: int, samples: int) -> set[int]:
        """The rows that are among the chosen ones up to here; later ones may take their places."""
        numbers = np.random.default_rng((self.seed, shard)).random(samples)
        for row in np.argsort(numbers)[: self.size].tolist():
            entry = (-float(numbers[row]), shard, row)
            if len(self._heap) < self.size:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)
        return {row for _, at, row in self._heap if at == shard}

    def put(self, shard: int, tiles: dict[int, Tile]) -> None:
        self._tiles.update({(shard, row): tile for row, tile in tiles.items()})
        chosen = {(at, row) for _, at, row in self._heap}
        self._tiles = {place: tile for place, tile in self._tiles.items() if place in chosen}

    def unseen(self) -> dict[int, list[int]]:
        """By shard the rows that are chosen and were looked at by another process."""
        found: dict[int, list[int]] = {}
        for _, shard, row in self._heap:
            if (shard, row) not in self._tiles:
                found.setdefault(shard, []).append(row)
        return found

    def tiles(self) -> list[Tile]:
        return [self._tiles[place] for place in sorted(self._tiles)]


@dataclass
class _Tasks:
    """Parts of shards in other processes, at most `limit` at once."""

    pool: ProcessPoolExecutor
    report: Report
    choice: _Choice
    fast: bool
    tile_px: int
    limit: int
    progress: Callable[[float], None]
    text: TextConfig | None
    kept: Kept | None
    _running: deque[_Task] = field(default_factory=deque)

    def submit(self, path: Path, name: str, index: ShardIndex, number: int, shard: ShardFacts) -> None:
        if not len(index):
            self.progress(1)
            self._keep(name, shard)
        chosen = self.choice.draw(number, len(index))
        for start in range(0, len(index), ROWS_PER_TASK):
            while len(self._running) >= self.limit:
                self._collect()
            part = _rows(index, start, start + ROWS_PER_TASK)
            rows = {row - start for row in chosen if start <= row < start + ROWS_PER_TASK}
            future = self.pool.submit(look_at, path, name, part, self.fast, rows, self.tile_px, self.text)
            last = start + ROWS_PER_TASK >= len(index)
            self._running.append(_Task(future, name, number, start, len(part) / len(index), shard, last))

    def finish(self) -> None:
        while self._running:
            self._collect()

    def _collect(self) -> None:
        task = self._running.popleft()
        try:
            facts, tiles = task.future.result()
        except BrokenProcessPool as error:
            raise DataError(
                f"A process that decodes pictures died at {task.name} or a shard just behind it: a picture crashed "
                "its decoder, or there is too little memory."
            ) from error
        except OSError as error:
            self.report.unreadable[task.name] = sentence(error)
            task.shard.whole = False
        else:
            if self.kept is not None:
                task.shard.facts.append(facts)
            self.report.facts.add(facts)
            self.choice.put(task.number, {task.start + row: tile for row, tile in tiles.items()})
        self.progress(task.share)
        if task.last:
            self._keep(task.name, task.shard)

    def _keep(self, name: str, shard: ShardFacts) -> None:
        if self.kept is not None and shard.whole:
            self.kept.write(name, shard)


@dataclass(frozen=True)
class _Task:
    """start: the first row; share: of the shard's rows; last: of the shard"""

    future: Future[tuple[Facts, dict[int, Tile]]]
    name: str
    number: int
    start: int
    share: float
    shard: ShardFacts
    last: bool


def _tiles_of(
    pool: ProcessPoolExecutor, url: str, rows: Sequence[int], fast: bool, tile_px: int
) -> dict[int, Tile]:
    with local_copy(url) as path:
        with path.open("rb") as file:
            index = ShardIndex.scan(url, file.fileno())
        found = {}
        for row in rows:
            one = pool.submit(look_at, path, url, _rows(index, row, row + 1), fast, {0}, tile_px)
            found[row] = one.result()[1][0]
    return found


def _rows(index: ShardIndex, start: int, stop: int) -> ShardIndex:
    flaws = {row - start: flaw for row, flaw in index.flaws.items() if start <= row < stop}
    part = slice(start, stop)
    return replace(
        index, keys=index.keys[part], offsets=index.offsets[part], sizes=index.sizes[part], flaws=flaws
    )


def _start() -> None:
    leave_interrupts()
    warnings.simplefilter("ignore")  # Pillow's, about pictures that it reads all the same


def _digests(keys: Iterator[str]) -> np.ndarray:
    """uint64; two different keys get the same with a chance of 1 in 10^19."""
    joined = b"".join(
        hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys
    )
    return np.frombuffer(joined, dtype=np.uint64)
