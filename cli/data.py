"""`t2i data`: makes shards, of an embedded source or of pictures of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from .console import console
from .embedded import SHAPES_SIZE_PX, make


def run(arguments: list[str]) -> None:
    """Parses, makes, says where."""
    options = parser().parse_args(arguments)
    if options.action == "make":
        console.print(f"{options.source} is in {make(options.source, options.size_px)}")
    else:
        pack(options)


def parser() -> argparse.ArgumentParser:
    """One subcommand per job."""
    made = argparse.ArgumentParser(prog="t2i data", description="Make shards.")
    actions = made.add_subparsers(dest="action", required=True)
    embedded = actions.add_parser("make", help="an embedded source")
    embedded.add_argument("source", choices=["emoji", "shapes"])
    embedded.add_argument(
        "--size-px", type=int, default=SHAPES_SIZE_PX, help="side of the pictures; shapes only"
    )
    own = actions.add_parser("pack", help="pictures of your own", description="Pictures to shards.")
    own.add_argument("source", help="folder with a .txt beside each picture, or a .csv or .jsonl")
    own.add_argument("out", help="folder for the shards; what is there already is not made again")
    own.add_argument("--samples-per-shard", type=int, default=1000)
    own.add_argument("--path-column", default="path", help="of a table; counted from its folder")
    own.add_argument("--caption-column", default="caption", help="of a table")
    return made


def pack(options: argparse.Namespace) -> None:
    """Packs under a progress bar and reports what was left out."""
    from rich.progress import Progress

    from t2i_pipelines.pack import pack as pack_rows
    from t2i_pipelines.pack import rows_of

    rows = rows_of(Path(options.source), options.path_column, options.caption_column)
    out = Path(options.out)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("pictures", total=len(rows))
        report = pack_rows(rows, out, options.samples_per_shard, lambda done: bar.advance(task, done))
    console.print(f"{report.packed} of {len(rows)} pictures are in {report.shards} shards in {out}")
    for cause, count in sorted(report.failed.items()):
        console.print(f"Left out, {cause}: {count} (named in {out}/*_stats.json)", markup=False)
