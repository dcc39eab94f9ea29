"""`t2i data pack`: pictures of one's own to shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from t2i.few import plural

from ..arguments import Parser
from ..console import console, progress_bar


def run(arguments: list[str]) -> None:
    """Packs under a progress bar and reports what was left out."""
    options = parser().parse_args(arguments)
    from t2i_pipelines.pack import pack
    from t2i_pipelines.rows import rows_of

    rows = rows_of(Path(options.source), options.path_column, options.caption_column)
    out = Path(options.out)
    with progress_bar() as bar:
        task = bar.add_task("pictures", total=rows.count)
        report = pack(
            rows, out, options.samples_per_shard, lambda done: bar.advance(task, done), options.format
        )
    console.print(
        f"{report.packed:,} of {plural(rows.count, 'picture')} packed in {plural(report.shards, 'shard')} in {out}"
    )
    for cause, count in sorted(report.failed.items()):
        console.print(f"Left out, {cause}: {count} (named in {out}/*_stats.json)")
    for cause, count in sorted(rows.passed_by().items()):
        console.print(f"Passed by in {options.source}, {cause}: {count:,}")
    if len(report.formats) > 1:
        mixed = ", ".join(f"{count:,} {extension}" for extension, count in report.formats.most_common())
        console.print(
            f"The formats are mixed ({mixed}): t2i and webdataset read all; HF datasets refuses such shards, and "
            "clip-retrieval reads their jpg alone. --format png|webp|jpg makes all of one"
        )
    if not report.tables:
        console.print("No .parquet beside the shards, as pyarrow is missing: pip install 't2i[data]'")


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="t2i data pack", description="Pictures to shards.")
    made.add_argument(
        "source", help="folder with a .txt beside each picture, or a .parquet, .csv, .tsv or .jsonl"
    )
    made.add_argument("out", help="folder for the shards; what is there already is not made again")
    made.add_argument(
        "--format",
        choices=["jpg", "png", "webp"],
        help="encode pictures of other formats anew: png and webp without loss, jpg at quality 95, upright, on white, "
        "in sRGB (default: jpg, png and webp keep their bytes, others become png)",
    )
    made.add_argument("--samples-per-shard", type=int, default=1000, help="at most")
    made.add_argument("--path-column", default="path", help="of a table; counted from its folder")
    made.add_argument("--caption-column", default="caption", help="of a table")
    return made
