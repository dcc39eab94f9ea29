"""Tables of URLs and captions to shards in the layout of img2dataset."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path

from t2i.data.decode import BadSample
from t2i.errors import ConfigError, DataError
from t2i.launch.ranks import ALONE, Rank

from ..pictures import Picture, prepare
from ..processes import cores
from ..shard_writer import check_no_more, check_samples_per_shard, sample_key
from ..tables import Table, json_records
from .fetch import FetchError, FetchLimits, fetch, open_session
from .open_shard import OpenShard

COPIES = ".table"  # folder within `out` for a table that is not on this machine, until the job is done
MAX_SHARDS = 100_000  # the key has five digits for the shard
MAX_OPEN_SHARDS = 64  # each has a file open
MAX_DECODERS = 8  # one loop of requests does not feed more
CHECKED_AT_ONCE = 16  # pictures that go to a decoder together
RESOLVERS = 64  # look-ups of names that wait at the same time, each in a thread


@dataclass(frozen=True)
class DownloadOptions:
    """samples_per_shard: rows of the table, those that fail included
    connections: requests under way at the same time
    image_size_px: pictures whose shorter side is longer are reduced to it (`pictures.prepare`); None: every picture
        keeps its bytes. Unlike img2dataset, which by default brings everything to a square of 256 px, enlarges what
        is smaller and encodes all anew: training crops for itself, at one resolution after another, and needs no
        second loss by JPEG.
    decoders: processes that check and reduce pictures; 0: a thread of this one
    allow_private_addresses: see `fetch.open_session`
    """

    samples_per_shard: int = 1000
    connections: int = 256
    limits: FetchLimits = field(default_factory=FetchLimits)
    image_size_px: int | None = None
    decoders: int = 1
    allow_private_addresses: bool = False

    def __post_init__(self) -> None:
        check_samples_per_shard(self.samples_per_shard)
        for name, value, least in (
            ("connections", self.connections, 1),
            ("timeout_s", self.limits.timeout_s, 0.001),
            ("max_mib", self.limits.max_mib, 0.001),
            ("retries", self.limits.retries, 0),
            ("image_size_px", 1 if self.image_size_px is None else self.image_size_px, 1),
        ):
            if not value >= least:
                raise ConfigError(f"{name} is {value}; allowed: {least} or more.")


@dataclass
class Report:
    """shards: in the folder; skipped: those that were there already; statuses: rows by "success" or cause, of all
    shards; fetched, fetched_bytes: pictures of this run, as they came; seconds: of this run"""

    shards: int = 0
    skipped: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    fetched: int = 0
    fetched_bytes: int = 0
    seconds: float = 0.0


def copies_name(rank: Rank) -> str:
    """Each process has copies of its own."""
    return COPIES if rank.world == 1 else f"{COPIES}{rank.rank}"


def default_decoders() -> int:
    """A process for each core but the one that fetches."""
    return max(1, min(MAX_DECODERS, cores() - 1))


def download(
    table: Table,
    out: Path,
    options: DownloadOptions,
    url_column: str,
    caption_column: str,
    progress: Callable[[int], None],
    report: Report | None = None,
    rank: Rank = ALONE,
) -> Report:
    """Fetches what `table` names and writes `out`/00000.tar, 00000.parquet and 00000_stats.json, 00001.tar, ...

    Shard i holds rows i * samples_per_shard and on; samples lie in the order of the table, so that the same answers
    give the same tar and parquet. Shards that are there are not fetched again. A shard gets its name when it is
    complete, the tar last. progress is called with the number of rows done with; `report` is filled on the way, for
    who stops it.
    rank: of several processes, each of which makes its share of the shards
    Raises DataError where a shard that is there was made from other rows or at another size, or where nothing can be
    written.
    """
    report = report or Report()
    shards = -(-table.rows // options.samples_per_shard)
    if shards > MAX_SHARDS:
        least = -(-table.rows // MAX_SHARDS)
        raise DataError(f"The table has {table.rows} rows, which takes {least} or more samples per shard.")
    check_no_more(out, shards, "the table's rows")
    _allow_open_files(4 * options.connections + 2 * MAX_OPEN_SHARDS)
    job = _Job(table, out, options, url_column, caption_column, rank)
    start = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        asyncio.run(job.run(progress, report))
    except BaseExceptionGroup as group:
        error = _first(group)
        if isinstance(error, OSError):
            raise DataError(f"{out} cannot be written: {error}.") from group
        if isinstance(error, BrokenExecutor):
            raise DataError(
                "A process that decodes pictures died, perhaps for want of memory; the same command goes on "
                f"after the shards that are complete in {out}."
            ) from group
        raise error from group
    finally:
        report.seconds = time.monotonic() - start
    shutil.rmtree(out / copies_name(rank), ignore_errors=True)
    return report


def _first(group: BaseExceptionGroup) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ConfigError(
            f"So many connections take {count} open files, and this system allows {hard} (ulimit -Hn)."
        )
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@dataclass(frozen=True)
class _Fetched:
    shard: OpenShard
    place: int
    data: bytes


class _Job:
    def __init__(
        self,
        table: Table,
        out: Path,
        options: DownloadOptions,
        url_column: str,
        caption_column: str,
        rank: Rank,
    ) -> None:
        self.out = out
        self.options = options
        self.url_column = url_column
        self.caption_column = caption_column
        every = enumerate(table.slices(options.samples_per_shard))
        self.slices = itertools.islice(every, rank.rank, None, rank.world)

    async def run(self, progress: Callable[[int], None], report: Report) -> None:
        """Starts a request for each row, in order, and never more than `connections` at once."""
        options = self.options
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(RESOLVERS))  # where names are looked up
        connections = asyncio.Semaphore(options.connections)
        # Enough for all connections and for what comes while the slowest answer is waited for.
        ahead = 2 + 32 * options.connections // options.samples_per_shard
        open_shards = asyncio.Semaphore(min(ahead, MAX_OPEN_SHARDS))

        # What is fetched waits here to be checked. While it is full, what came keeps its connection's place.
        fetched: asyncio.Queue[_Fetched] = asyncio.Queue(4 * CHECKED_AT_ONCE * max(1, options.decoders))

        async def get(shard: OpenShard, place: int) -> None:
            try:
                data = await fetch(session, shard.urls[place], options.limits)
                report.fetched += 1
                report.fetched_bytes += len(data)
                await fetched.put(_Fetched(shard, place, data))
            except FetchError as error:
                shard.fail(place, "failed_to_download", error.cause, str(error))
                done(shard)
            finally:
                connections.release()

        async def check() -> None:
            while True:
                batch = [
                    await fetched.get()
                ]  # more than one at a time, as a way to another process and back costs
                while len(batch) < CHECKED_AT_ONCE and not fetched.empty():
                    batch.append(fetched.get_nowait())
                files = [(sample_key(each.shard.number, each.place), each.data) for each in batch]
                found = await loop.run_in_executor(decoders, _prepared, files, options.image_size_px)
                await loop.run_in_executor(disk, _store, batch, found)
                for each in batch:
                    done(each.shard)
                    fetched.task_done()

        def done(shard: OpenShard) -> None:
            progress(1)
            shard.undone -= 1
            if shard.undone == 0:
                finishing = finish(shard)
                try:
                    jobs.create_task(finishing)
                except RuntimeError:  # another shard could not be written: all is being stopped
                    finishing.close()
                    raise

        async def finish(shard: OpenShard) -> None:
            writing = disk.submit(shard.finish)
            try:
                await asyncio.wrap_future(writing)
            finally:  # one that is being written when all is stopped will be there, and counts
                if not writing.cancelled() and writing.exception() is None:
                    report.shards += 1
                    report.statuses.update(shard.statuses)
            open_shards.release()

        with ThreadPoolExecutor(2) as disk, _decoders(options.decoders) as decoders:
            async with (
                open_session(options.connections, options.allow_private_addresses) as session,
                asyncio.TaskGroup() as jobs,
            ):
                checks = [jobs.create_task(check()) for _ in range(2 * max(1, options.decoders))]
                async with asyncio.TaskGroup() as requests:
                    while (shard := await loop.run_in_executor(disk, self._next)) is not None:
                        if isinstance(shard, OpenShard):
                            await open_shards.acquire()
                            for place in range(len(shard.urls)):
                                await connections.acquire()
                                requests.create_task(get(shard, place))
                        else:
                            report.shards += 1
                            report.skipped += 1
                            report.statuses.update(shard)
                            progress(sum(shard.values()))
                await fetched.join()
                for task in checks:
                    task.cancel()

    def _next(self) -> OpenShard | Counter[str] | None:
        """The next shard; of one that is there, how many rows came to what. Raises DataError for one of others."""
        number, rows = next(self.slices, (0, None))
        if rows is None:
            return None
        known = [self.options.image_size_px, self.url_column, self.caption_column, json_records(rows)]
        digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        path = self.out / f"{number:05d}.tar"
        if not path.exists():
            return OpenShard(number, rows, self.url_column, self.caption_column, digest, self.out)
        try:
            stats = json.loads((self.out / f"{number:05d}_stats.json").read_text())
            if stats["rows"] == digest:
                return Counter(stats["status_dict"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise DataError(
            f"{path} was not downloaded from these rows with these options; remove it, or name another folder."
        )


def _prepared(files: list[tuple[str, bytes]], shorter_side_px: int | None) -> list[Picture | tuple[str, str]]:
    """`prepare` for each (key, bytes); of a bad picture the cause and what is wrong, as exceptions of our own do not
    pass between processes."""
    found: list[Picture | tuple[str, str]] = []
    for key, data in files:
        try:
            found.append(prepare(data, key, shorter_side_px))
        except BadSample as error:
            found.append((error.cause, str(error).removeprefix(f"sample {key}: ")))
    return found


def _store(batch: list[_Fetched], found: list[Picture | tuple[str, str]]) -> None:
    for each, picture in zip(batch, found, strict=True):
        if isinstance(picture, Picture):
            each.shard.succeed(each.place, picture, picture.image or each.data)
        else:
            each.shard.fail(each.place, "failed_to_resize", *picture)


def _decoders(processes: int) -> Executor:
    if processes == 0:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks as they are
    pool = ProcessPoolExecutor(processes, context, _start_decoder)
    # Processes start when they are first needed, and Ctrl-C would end one that imports: so they start here, and inherit
    # that it is blocked. The tracker of their semaphores comes first, as it unblocks Ctrl-C when it starts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(processes):
            pool.submit(_prepared, [], None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def _start_decoder() -> None:
    """Leaves Ctrl-C to the parent, and ends with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
