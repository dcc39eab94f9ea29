"""The read path side by side with webdataset, datasets, litdata and mosaicml-streaming: same samples, same work.

    python benchmarks/data.py --peer datasets=PYTHON --peer litdata=PYTHON --peer streaming=PYTHON

PYTHON is an interpreter that has the peer, torch and Pillow (benchmarks/requirements-data-peers.txt); webdataset is in
t2i's own. Each contender runs alone in a process of its own, in turns (A B C, A B C, ...), so that a busy machine slows
all alike; what is printed are medians over the turns, and the medians of each turn's ratio to t2i. CPU time is that of
the reader processes and the one they read for; it says more than wall time where other jobs take turns on the cores.
The files are in the page cache for all. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data_shards import write_shards

SCRIPT = Path(__file__).with_name("data_peers.py")
PARTS = ("decoded", "raw", "resume", "memory", "start")
TIMEOUT_S = 1800
START = Path(__file__).with_name("data_start.py")
MANY = 200_000  # shards
POSITIONS = {"1%": 1_024, "50%": 50_016, "99%": 99_008}  # of 100,000, whole batches


class Contenders:
    """Runs tasks of benchmarks/data_peers.py, each in the interpreter of its contender, with files in `work`."""

    def __init__(self, pythons: dict[str, str], work: Path) -> None:
        self.pythons = pythons
        self.cache = work / "cache"
        folders = {"HF_HOME": work / "huggingface", "TMPDIR": work, "XDG_CACHE_HOME": self.cache}
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1"} | {k: str(v) for k, v in folders.items()}

    def __call__(self, name: str, task: str, **options: Any) -> Any:
        command = [self.pythons[name], str(SCRIPT), name, task, json.dumps(options)]
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise SystemExit(f"{name} {task} did not end within {TIMEOUT_S} s.") from error
        if done.returncode:
            raise SystemExit(f"{name} {task} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def turns(rows: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What each row measures, in turns."""
    found: dict[str, list[Any]] = {name: [] for name in rows}
    for turn in range(rounds):
        for name, measure in rows.items():
            print(f"  turn {turn + 1} of {rounds}: {name}", end="\033[K\r", file=sys.stderr, flush=True)
            found[name].append(measure())
    return found


def table(title: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and the medians over the turns of how much faster t2i is than each row."""
    print(f"\n{title}\n\n| | samples/s | CPU ms per sample | t2i faster by | with less CPU time by |")
    print("|---|---|---|---|---|")
    for name, values in found.items():
        pairs = list(zip(found["t2i"], values, strict=True))
        faster = statistics.median(own["per_s"] / other["per_s"] for own, other in pairs)
        less = statistics.median(other["cpu_ms"] / own["cpu_ms"] for own, other in pairs)
        per_s, cpu_ms = (statistics.median(value[key] for value in values) for key in ("per_s", "cpu_ms"))
        print(f"| {name} | {per_s:,.0f} | {cpu_ms:.2f} | {faster:.2f}x | {less:.2f}x |", flush=True)


def decoded(run: Contenders, photos: Path, rounds: int) -> None:
    """Pictures of 512 to 1,024 px to 256 px."""
    options = {"folder": str(photos), "size_px": 256, "warm_up": 96, "count": 288}

    def row(name: str, decode: str, workers: int) -> Callable[[], Any]:
        return lambda: run(name, "decoded", decode=decode, workers=workers, **options)

    rows = {name: row(name, "usual", 1) for name in run.pythons}
    table("Decoded, each as its documentation does it, 1 worker", turns(rows, rounds))
    rows = {name: row(name, "ours", 1) for name in run.pythons}
    table("Decoded, all by t2i's decoder, 1 worker", turns(rows, rounds))
    rows = {name: row(name, "usual", 2) for name in run.pythons}
    rows["t2i, 1 worker"] = row("t2i", "usual", 1)
    table("Decoded, each as its documentation does it, 2 workers", turns(rows, rounds))


def raw(run: Contenders, indexed: Path, folder: Path, count: int, rounds: int) -> None:
    """The bytes alone, shuffled, in the process that reads."""

    def row(name: str) -> Callable[[], Any]:
        where = str(indexed if name == "t2i" else folder)
        return lambda: run(name, "raw", folder=where, warm_up=1500, count=count)

    table(f"Raw, {folder.name}", turns({name: row(name) for name in run.pythons}, rounds))


def resume(run: Contenders, epoch: Path, indexed: Path, rounds: int) -> None:
    """From imports done to the first batch, 1 worker."""
    options = {"workers": 1, "decode": "ours", "size_px": 64}
    for name in run.pythons:
        run(name, "save", folder=str(epoch), positions=list(POSITIONS.values()))
    print(
        f"\nFirst batch of a resumed epoch of 100,000, seconds\n\n| | {' | '.join(POSITIONS)} |\n|---|---|---|---|"
    )

    def first(name: str, folder: Path, at: int, new: bool = False, **more: Any) -> Any:
        """new: as if nothing had been read from these shards before"""
        if new:
            shutil.rmtree(run.cache, ignore_errors=True)
        return run(name, "first", folder=str(folder), position=at, **options, **more)

    def row(title: str, name: str, folder: Path, **more: Any) -> None:
        rows = {position: partial(first, name, folder, at, **more) for position, at in POSITIONS.items()}
        found = turns(rows, rounds).values()
        medians = ["none left" if None in values else f"{statistics.median(values):.2f}" for values in found]
        print(f"| {title} | {' | '.join(medians)} |", flush=True)

    row("t2i, indexed", "t2i", indexed)
    row("t2i, indexed, pictures chosen by their size", "t2i", indexed, min_original_px=64)
    row("t2i, not indexed, first start", "t2i", epoch, new=True)
    row("t2i, not indexed", "t2i", epoch)
    for name in run.pythons:
        if name != "t2i":
            row(name, name, epoch)


def memory(run: Contenders, indexed: Path, folder: Path) -> None:
    """One epoch of 100,000, 1 worker: RSS of the worker."""
    print("\nMemory of the worker over an epoch of 100,000\n")
    print(
        "| | MiB after 10% | at the end | highest | MiB more per 100,000 after 10% |\n|---|---|---|---|---|"
    )
    for name in run.pythons:
        where = indexed if name == "t2i" else folder
        found = run(name, "memory", folder=str(where), workers=1, decode="ours", size_px=64, samples=100_000)
        settled = found[len(found) // 10 :]
        at, mib = zip(*settled, strict=True)
        slope = statistics.linear_regression(at, mib).slope * 100_000
        print(
            f"| {name} | {mib[0]:.0f} | {mib[-1]:.0f} | {max(m for _, m in found):.0f} | {slope:+.1f} |",
            flush=True,
        )


def index(tars: list[str]) -> None:
    """What a user does before the first start."""
    t2i = str(Path(sys.executable).with_name("t2i"))
    subprocess.run([t2i, "data", "index", *tars], check=True, stdout=sys.stderr)


def start(work: Path, rounds: int) -> None:
    """The first batch of MANY indexed shards of two samples, local ones and on a web server of this machine."""
    many = work / "many"
    write_shards(many, 2 * MANY, 2, (24, 40), None)
    name = f"{{{0:06d}..{MANY - 1:06d}}}.tar"
    for call in ("first", "second"):
        began = time.perf_counter()
        index([f"{many}/{name}"])
        print(f"\n{call} `t2i data index` of {MANY:,} shards: {time.perf_counter() - began:.0f} s")
    print("\n| | seconds | CPU seconds | MiB above the imports | of the worker, in all | shards fetched |")
    print("|---|---|---|---|---|---|")
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(many),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            port = re.findall(r"port (\d+)", server.stdout.readline())[0]
            for place, base in (("local", str(many)), ("remote", f"http://127.0.0.1:{port}")):
                for title, minimum, step in (
                    ("no smallest size", 0, None),
                    ("a smallest size", 25, None),
                    ("a smallest size and buckets", 25, 4),
                ):
                    options = {
                        "shards": [f"{base}/{name}"],
                        "min_original_px": minimum,
                        "bucket_step_px": step,
                    }
                    found = [started(work, options) for _ in range(rounds)]
                    medians = [
                        statistics.median(one[key] for one in found)
                        for key in ("s", "cpu_s", "mib", "worker_mib", "fetched")
                    ]
                    print(
                        f"| {place}, {title} | {' | '.join(f'{median:,.1f}' for median in medians)} |",
                        flush=True,
                    )
        finally:
            server.terminate()


def started(work: Path, options: dict[str, Any]) -> dict[str, float]:
    """fetched: shards that were copied for the first batch, and those that were brought closer for the next ones"""
    cache = work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(START), json.dumps(options)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_S
    )
    fetched = len(list((cache / "t2i" / "shards").glob("*.tar")))
    return json.loads(done.stdout) | {"fetched": fetched}


def main() -> None:
    """Makes the shards and the peers' copies of them, then prints a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--work", type=Path, help="folder for about 12 GB, kept; default: a temporary one")
    parser.add_argument("--pictures", type=Path, help="folder of photos; default: synthetic pictures")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if "start" in options.only:
            start(work, min(3, options.rounds))
        if options.only == ["start"]:
            return
        photos, epoch, indexed = work / "photos", work / "epoch", work / "epoch-indexed"
        write_shards(photos, 6_000, 300, (512, 1024), options.pictures)
        write_shards(epoch, 100_000, 1_000, (128, 192), options.pictures)
        if not indexed.exists():
            indexed.mkdir()
            for tar in epoch.glob("*.tar"):
                (indexed / tar.name).symlink_to(tar)
        for folder in (photos, indexed):
            index(list(map(str, sorted(folder.glob("*.tar")))))
        pythons = {"t2i": sys.executable, "webdataset": sys.executable}
        run = Contenders(pythons | dict(peer.split("=", 1) for peer in options.peer), work)
        for name in run.pythons:
            for folder in (photos, epoch):
                if not folder.with_name(f"{folder.name}-{name}").exists():
                    run(name, "convert", folder=str(folder))
        if "decoded" in options.only:
            decoded(run, photos, options.rounds)
        if "raw" in options.only:
            raw(run, photos, photos, 4_000, options.rounds)
            raw(run, indexed, epoch, 20_000, options.rounds)
        if "resume" in options.only:
            resume(run, epoch, indexed, min(3, options.rounds))
        if "memory" in options.only:
            memory(run, indexed, epoch)


if __name__ == "__main__":
    main()
