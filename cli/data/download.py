"""`t2i data download`: a table of URLs and captions to shards."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from t2i.few import plural

from ..arguments import Parser
from ..console import console, part_of, progress_bar


def run(arguments: list[str]) -> None:
    """Downloads under a progress bar and reports what was left out. Ctrl-C leaves complete shards only."""
    options = parser().parse_args(arguments)
    from t2i.launch.ranks import rank_of
    from t2i_pipelines.downloading import download as job
    from t2i_pipelines.downloading.fetch import FetchLimits
    from t2i_pipelines.tables import open_table, text_column

    out, rank = Path(options.out), rank_of(os.environ)
    limits = FetchLimits(options.timeout_s, options.max_mib, options.retries)
    chosen = job.DownloadOptions(
        options.samples_per_shard,
        options.connections,
        limits,
        options.image_size_px,
        job.default_decoders(),
        options.allow_private_addresses,
    )
    captions = [options.caption_column] if options.caption_column else ["caption", "text"]
    table = open_table(
        options.table, out / job.copies_name(rank), {name.lower() for name in (options.url_column, *captions)}
    )
    url_column, caption_column = text_column(table, options.url_column), text_column(table, *captions)
    for name in table.left_out:
        console.print(f"Column {name} is left out: it holds bytes")
    report = job.Report()
    stopped = False
    with progress_bar() as bar:
        task = bar.add_task("pictures", total=-(-table.rows // rank.world))
        try:
            job.download(
                table,
                out,
                chosen,
                url_column,
                caption_column,
                lambda done: bar.advance(task, done),
                report,
                rank,
            )
        except KeyboardInterrupt:
            stopped = True
    counts = report.statuses.copy()
    console.print(
        f"{counts.pop('success', 0):,} of {plural(report.statuses.total(), 'picture')} packed in "
        f"{plural(report.shards, 'shard')} in {out}"
        + (f", {report.skipped} of which were there" if report.skipped else "")
        + part_of(rank),
    )
    for cause, count in sorted(table.unusable.items()):
        console.print(f"Of the table, not read, {cause}: {count:,}")
    for cause, count in sorted(counts.items()):
        console.print(f"Left out, {cause}: {count:,} (named in {out}/*.parquet)")
    if counts["private_address"] and not options.allow_private_addresses:
        console.print(
            "Of this machine or a private network: --allow-private-addresses fetches them, to another folder"
        )
    if report.fetched:
        rate, mib = report.fetched / report.seconds, report.fetched_bytes / (1 << 20)
        console.print(
            f"Fetched {plural(report.fetched, 'picture')}, {mib:,.0f} MiB, in {report.seconds:,.0f} s: "
            f"{rate:,.0f} pictures/s, {mib / report.seconds:,.1f} MiB/s"
        )
    if stopped:
        console.print("Stopped: the shards that are there are complete; the same command goes on after them")
        raise SystemExit(130)


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="t2i data download", description="URLs to shards, in the layout of img2dataset.")
    made.add_argument("table", help=".parquet, .csv, .tsv or .jsonl; several by braces or *; a path or a URL")
    made.add_argument("out", help="folder for the shards; those that are there already are not fetched again")
    made.add_argument("--url-column", default="url", help="in any case")
    made.add_argument("--caption-column", help="in any case (default: caption, or else text)")
    made.add_argument("--samples-per-shard", type=int, default=1000, help="rows, those that fail included")
    made.add_argument("--connections", type=int, default=256, help="requests at the same time")
    made.add_argument("--timeout-s", type=float, default=10, help="for one picture, all retries included")
    made.add_argument("--max-mib", type=float, default=20, help="of one picture")
    made.add_argument("--retries", type=int, default=2, help="after connection errors, 429 and 5xx")
    made.add_argument(
        "--allow-private-addresses",
        action="store_true",
        help="fetch from this machine and private networks too, wherever a URL, its name or a redirect leads",
    )
    made.add_argument(
        "--image-size-px",
        type=int,
        metavar="PX",
        help="reduce pictures whose shorter side is longer to it (default: keep every picture as it comes)",
    )
    return made
