"""`t2i data pack`: pictures of one's own to shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..console import console


def run(arguments: list[str]) -> None:
    """Packs under a progress bar and reports what was left out."""
    options = parser().parse_args(arguments)
    from rich.progress import Progress

    from t2i_pipelines.pack import pack, rows_of

    rows = rows_of(Path(options.source), options.path_column, options.caption_column)
    out = Path(options.out)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("pictures", total=len(rows))
        report = pack(rows, out, options.samples_per_shard, lambda done: bar.advance(task, done))
    console.print(f"{report.packed} of {len(rows)} pictures are in {report.shards} shards in {out}")
    for cause, count in sorted(report.failed.items()):
        console.print(f"Left out, {cause}: {count} (named in {out}/*_stats.json)")
    if not report.tables:
        console.print("No .parquet beside the shards, as pyarrow is missing: pip install 't2i[data]'")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="t2i data pack", description="Pictures to shards.")
    made.add_argument("source", help="folder with a .txt beside each picture, or a .csv, .jsonl or .parquet")
    made.add_argument("out", help="folder for the shards; what is there already is not made again")
    made.add_argument("--samples-per-shard", type=int, default=1000)
    made.add_argument("--path-column", default="path", help="of a table; counted from its folder")
    made.add_argument("--caption-column", default="caption", help="of a table")
    return made
