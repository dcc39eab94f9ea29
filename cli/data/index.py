"""`t2i data index`: where each sample lies in its shard, for an instant start."""

from __future__ import annotations

import argparse
from pathlib import Path

from t2i.few import first_few

from ..console import console


def run(arguments: list[str]) -> None:
    """Indexes under a progress bar and reports what the tar files lost."""
    options = parser().parse_args(arguments)
    from rich.progress import Progress

    from t2i.data.sources import expand
    from t2i_pipelines.indexing import index_shards
    from t2i_pipelines.processes import cores

    urls = list(dict.fromkeys(expand(options.shards, "SHARDS")))
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("shards", total=len(urls))
        out = Path(options.out) if options.out else None
        report = index_shards(urls, out, options.processes or cores(), lambda done: bar.advance(task, done))
    there = f", {report.skipped} were up to date" if report.skipped else ""
    console.print(f"{report.samples} samples in {report.shards + report.skipped} shards are indexed{there}")
    for cause, count in report.flaws.most_common():
        console.print(f"Lost by the tar files, {cause}: {count}")
    for line in first_few([f"Not indexed, {url}: {why}" for url, why in report.unreadable.items()]):
        console.print(line)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="t2i data index", description="Index shards.")
    made.add_argument("shards", nargs="+", help="paths or URLs, with braces")
    made.add_argument(
        "--out", help="folder for the indexes, where the shards are remote; upload it beside them"
    )
    made.add_argument("--processes", type=int, help="default: one per core")
    return made
