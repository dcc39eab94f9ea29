"""Where bytes come from: local paths, any fsspec URL (s3://, gs://, hf://, http://), and `pipe:` commands.

Every read has a deadline and a bounded number of attempts, so that nothing here can hang a run.
"""

from __future__ import annotations

import errno
import os
import queue
import random
import re
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from webdataset.shardlists import expand_urls

from t2i.errors import DataError

T = TypeVar("T")
TAR_ENDING = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz2?|txz)$")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
# Bytes asked for at once: large, because object stores charge by the request, in money and time.
BLOCK = 8 << 20
LOOKUPS = 32  # of local sources at a time; a network file system answers each after a while
MISSING, UNREADABLE = -1, -2


@dataclass(frozen=True)
class Limits:
    """deadline_s: seconds for one request; attempts: how often it is made before it counts as failed"""

    deadline_s: float = 60.0
    attempts: int = 4


class SourceError(DataError):
    """A source that cannot be read. missing: it is not there, rather than unreachable."""

    def __init__(self, url: str, detail: str, missing: bool = False) -> None:
        super().__init__(f"{url} {'does not exist' if missing else f'cannot be read: {detail}'}.")
        self.missing = missing


def expand(shards: str | Sequence[str], key: str = "data.shards", may_be_folders: bool = False) -> list[str]:
    """Paths and URLs with webdataset's brace expansion (`{00000..00009}.tar`, `a.tar::b.tar`).
    key: the configuration key that DataError names.
    may_be_folders: folders and the shell's patterns are taken too"""
    try:
        texts = [expand_urls(text) for text in ([shards] if isinstance(shards, str) else shards)]
    except (AssertionError, ValueError) as error:
        raise DataError(f"{key} {shards!r} cannot be expanded: {error}.") from error
    for urls in texts:
        if len(urls) == 1 and not may_be_folders:
            _check_shard(urls[0], key)
    expanded = [url for urls in texts for url in urls]
    if not expanded:
        raise DataError(f"{key} is {shards!r}; allowed: at least one path or URL.")
    return expanded


def _check_shard(url: str, key: str) -> None:
    """Raises DataError for a local folder and for a pattern of the shell. A name that ends as shards do is not looked
    for: there may be many, far away."""
    if not is_local(url) or (TAR_ENDING.search(url) and "*" not in url):
        return
    path = local_path(url)
    braces = "in braces, as in {00000..00004}.tar"
    if within(Limits().deadline_s, path.is_dir):
        raise DataError(f"{key} is {url!r}, a folder; allowed: the shards in it, {braces}.")
    if "*" in url and not within(Limits().deadline_s, path.exists):
        raise DataError(f"{key} is {url!r}, which does not exist; allowed: names {braces}, in place of *.")


def is_local(url: str) -> bool:
    return ":" not in url or _scheme(url) in ("", "file")


def _scheme(url: str) -> str:
    """As urlparse has it, which refuses some whole addresses."""
    before = url.partition(":")[0]
    return before.lower() if SCHEME.fullmatch(before) else ""


def local_path(url: str) -> Path:
    """The path of a local source."""
    if ":" in url and _scheme(url) == "file":
        return Path(url2pathname(urlparse(url).path))
    return Path(url).expanduser() if url.startswith("~") else Path(url)


def split_query(url: str) -> tuple[str, str]:
    """A web address and its query, "?" included; other sources have none."""
    if not url.startswith(("http://", "https://")):
        return url, ""
    address, mark, query = url.partition("?")
    return address, mark + query


def without_ending(path: str) -> str:
    """`a/00000.tar` or `a/00000.tar.gz` -> `a/00000`."""
    return TAR_ENDING.sub("", path)


def stem(url: str) -> str:
    """The name of a shard without its folder and ending; "pipe" for a command."""
    address, _ = split_query(url)
    return "pipe" if url.startswith("pipe:") else without_ending(PurePosixPath(address).name)


def beside(url: str, suffix: str) -> str:
    """`a/00000.tar` -> `a/00000` + suffix; "" for a pipe, which has nothing beside it."""
    address, query = split_query(url)
    return "" if url.startswith("pipe:") else without_ending(address) + suffix + query


def read_bytes(url: str, limits: Limits | None = None) -> bytes:
    """All of a small source. Raises SourceError."""
    if is_local(url):
        try:
            return within((limits or Limits()).deadline_s, lambda: _content(local_path(url)))
        except OSError as error:
            raise _source_error(url, error) from error
    if url.startswith("pipe:"):
        raise ValueError("a pipe is copied, not read")
    return _attempt(url, limits or Limits(), lambda fs, path: fs.cat_file(path))


def _content(path: Path) -> bytes:
    check_is_file(path)
    return path.read_bytes()


def check_is_file(path: Path) -> None:
    """Raises OSError for what is there and neither a file nor a folder, which who opens it names: a named pipe would
    wait, and /dev/zero never ends."""
    try:
        mode = path.stat().st_mode
    except OSError:  # who opens it says so
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is no file", str(path))


def size(url: str, limits: Limits | None = None) -> int | None:
    """Bytes of a source; None where a server does not say, and for a pipe. Raises SourceError."""
    if url.startswith("pipe:"):
        return None
    if is_local(url):
        try:
            return within((limits or Limits()).deadline_s, local_path(url).stat).st_size
        except OSError as error:
            raise _source_error(url, error) from error
    return _attempt(url, limits or Limits(), lambda fs, path: fs.info(path).get("size"))


def sizes(urls: Sequence[str], limits: Limits | None = None) -> np.ndarray:
    """(n,) int64 bytes of local sources, for many at once; MISSING or UNREADABLE where there is none to say."""
    deadline_s = (limits or Limits()).deadline_s

    def some(urls: Sequence[str]) -> list[int]:
        found: list[int] = []
        while len(found) < len(urls):
            rest, came = urls[len(found) :], list[int]()

            # Holds on to its own list: where it comes too late, what it adds to that is not looked at any more.
            def look(rest: Sequence[str] = rest, came: list[int] = came) -> None:
                for url in rest:
                    came.append(_size_now(url))

            try:
                within(deadline_s, look)
            except TimeoutError:
                came = [*came[: len(rest) - 1], UNREADABLE]
            found += came
        return found

    with ThreadPoolExecutor(LOOKUPS) as pool:
        answers = pool.map(some, [urls[start : start + 256] for start in range(0, len(urls), 256)])
        return np.array([size for answer in answers for size in answer], dtype=np.int64)


def _size_now(url: str) -> int:
    try:
        return os.stat(local_path(url)).st_size
    except OSError as error:
        return MISSING if isinstance(error, FileNotFoundError) else UNREADABLE


def copy(url: str, target: Path, limits: Limits | None = None) -> None:
    """Copies a remote source to the file `target`, block by block, going on where a connection was dropped if the
    server knows ranges. Raises SourceError; then `target` may hold a part."""
    limits = limits or Limits()
    target.unlink(missing_ok=True)
    if url.startswith("pipe:"):
        _copy_pipe(url, target, limits)
        return
    _attempt(url, limits, lambda fs, path: _copy_rest(fs, path, target, limits), deadline=False)


def _copy_rest(fs: Any, path: str, target: Path, limits: Limits) -> None:
    """What of `path` is not in `target` yet."""
    with target.open("ab") as part:
        with within(limits.deadline_s, lambda: fs.open(path, "rb", block_size=BLOCK)) as source:
            if part.tell():
                try:
                    source.seek(part.tell())
                except (OSError, ValueError, NotImplementedError):  # a server without ranges: from the start
                    part.truncate(0)
            while block := within(limits.deadline_s, lambda: source.read(BLOCK)):
                part.write(block)
            length = getattr(source, "size", None)
        if length is not None and part.tell() != length:
            raise OSError(f"{part.tell()} of {length} bytes came")


def _copy_pipe(url: str, target: Path, limits: Limits) -> None:
    command = url.removeprefix("pipe:")
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        stdout: IO[bytes] = process.stdout
        try:
            with target.open("wb") as part:
                while block := within(limits.deadline_s, lambda: stdout.read1(BLOCK)):  # type: ignore[attr-defined]
                    part.write(block)
            status = within(limits.deadline_s, process.wait)
        except (OSError, subprocess.SubprocessError) as error:
            os.killpg(process.pid, 9)
            raise SourceError(url, str(error)) from error
    if status != 0:
        raise SourceError(url, f"the command ended with status {status}")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. Raises TimeoutError after `seconds`; the call is then left to itself in its
    thread, as nothing can interrupt a read whose other end is silent."""
    helper: _Helper | None = getattr(_helpers, "own", None)
    if helper is None or helper.process != os.getpid():  # threads do not live on in a forked process
        helper = _helpers.own = _Helper()
    answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    helper.calls.put((call, answer))
    try:
        good, value = answer.get(timeout=seconds)
    except BaseException as error:  # also of an interruption: the helper is still at work
        del _helpers.own
        if isinstance(error, queue.Empty):
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        raise
    if good:
        return value
    raise value


class _Helper:
    """A thread that makes the calls of another one, which does not have to start a thread for each. It ends when that
    one does, or leaves it."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_make_calls, args=(self.calls,), daemon=True).start()

    def __del__(self) -> None:
        self.calls.put(None)


_helpers = threading.local()


def _make_calls(calls: queue.SimpleQueue[Any]) -> None:
    while (asked := calls.get()) is not None:
        call, answer = asked
        try:
            answer.put((True, call()))
        except BaseException as error:
            answer.put((False, error))
        del asked, call, answer  # and with them files that are to be closed


def _attempt(url: str, limits: Limits, call: Callable[[Any, str], T], deadline: bool = True) -> T:
    """`call(filesystem, path)`, as often as `limits` allow, with pauses of about 0.5, 1, 2, ... s between."""
    import fsspec

    if "::" in url:  # only out of a file: on the command line it stands between two shards
        raise SourceError(url, 'it has "::", which joins protocols; allowed: one')
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (
        Exception
    ) as error:  # its package is not there, none knows it, it wants an address, it connects now ...
        raise SourceError(url, str(error) or type(error).__name__) from error
    for attempt in range(limits.attempts):
        try:
            return within(limits.deadline_s, lambda: call(fs, path)) if deadline else call(fs, path)
        except PermissionError as error:
            raise _source_error(url, error) from error
        except Exception as error:  # each protocol's library raises its own
            status = _status(error)
            if isinstance(error, FileNotFoundError) and status in (404, 410):
                raise _source_error(url, error) from error
            refused = status in (
                400,
                401,
                403,
            )  # as of a signed address that is too old: asking again is no use
            if refused or attempt == limits.attempts - 1:
                tried = f"status {status}" if refused else f"after {limits.attempts} attempts"
                raise SourceError(url, f"{type(error).__name__}: {error} ({tried})") from error
            time.sleep(2**attempt * random.uniform(0.25, 0.75))
    raise AssertionError("attempts is at least 1")


def _status(error: BaseException) -> int:
    """The HTTP status behind an error: fsspec turns whatever a server answers to the first request into "not found"."""
    while error is not None and not isinstance(getattr(error, "status", None), int):
        error = error.__cause__  # type: ignore[assignment]
    return 404 if error is None else error.status  # type: ignore[attr-defined]


def _source_error(url: str, error: OSError) -> SourceError:
    return SourceError(url, error.strerror or str(error), isinstance(error, FileNotFoundError))
