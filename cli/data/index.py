"""`t2i data index`: where each sample lies in its shard, for an instant start."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from t2i.few import first_few, plural
from t2i.schema import check_number

from ..arguments import Parser
from ..console import console, part_of, progress_bar


def run(arguments: list[str]) -> None:
    """Indexes under a progress bar and reports what the tar files lost."""
    options = parser().parse_args(arguments)
    check_number("--processes", options.processes)
    from t2i.data.sources import expand
    from t2i.launch.ranks import rank_of
    from t2i_pipelines.indexing import index_shards, index_share
    from t2i_pipelines.processes import cores

    urls, rank = list(dict.fromkeys(expand(options.shards, "SHARDS"))), rank_of(os.environ)
    processes = options.processes or cores()
    with progress_bar() as bar:
        task = bar.add_task("shards", total=len(urls[rank.rank :: rank.world]))
        out = Path(options.out) if options.out else None
        if rank.world > 1:
            report = index_share(urls, out, processes, rank, lambda done: bar.advance(task, done))
        else:
            report = index_shards(urls, out, processes, lambda done: bar.advance(task, done))
    there = f", {plural(report.skipped, 'was', 'were')} up to date" if report.skipped else ""
    shards = report.shards + report.skipped
    console.print(
        f"Indexed {plural(report.samples, 'sample')} in {plural(shards, 'shard')}{there}{part_of(rank)}"
    )
    for cause, count in report.flaws.most_common():
        console.print(f"Lost by the tar files, {cause}: {count}")
    for line in first_few([f"Not indexed, {url}: {why}" for url, why in report.unreadable.items()]):
        console.print(line)


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="t2i data index", description="Index shards.")
    made.add_argument("shards", nargs="+", help="paths or URLs, with braces")
    made.add_argument(
        "--out", help="folder for the indexes, where the shards are remote; upload it beside them"
    )
    made.add_argument("--processes", type=int, help="default: one per core")
    return made
