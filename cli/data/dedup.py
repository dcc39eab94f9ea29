"""`t2i data dedup`: pictures that are there more than once, and a selection that has each once."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from t2i.errors import DataError
from t2i.few import plural
from t2i.schema import check_number

from ..arguments import Parser
from ..console import console, part_of, progress_bar
from .filter import repack_with_bar, selection_path


def run(arguments: list[str]) -> None:
    """Hashes and groups under progress bars, writes the selection and the report, and says what was found."""
    options = parser().parse_args(arguments)
    check_number("--workers", options.workers)
    from t2i.data.sources import expand
    from t2i.files import written_whole
    from t2i.launch.ranks import rank_of
    from t2i_pipelines.deduplication.dedup import find, hash_shards, write_kept
    from t2i_pipelines.deduplication.report import contact_sheet, write_report
    from t2i_pipelines.places import check_writable
    from t2i_pipelines.processes import cores

    written = selection_path(options.out)
    report = Path(options.report) if options.report else written.with_suffix(".report.json")
    for place in (written, report):
        check_writable(place)
    sources, rank = expand(options.shards, "SHARDS"), rank_of(os.environ)
    with progress_bar() as bar:
        hashing, grouping = bar.add_task("shards", total=None), bar.add_task("compared", total=None)
        shards, hashes = hash_shards(
            sources,
            options.hash,
            written.with_suffix(".hashes"),
            options.workers or cores(),
            lambda done, total: bar.update(hashing, completed=done, total=total),
            rank,
        )
        if rank.world > 1:
            console.print(f"{plural(len(shards), 'shard is', 'shards are')} hashed{part_of(rank)}")
            return
        found = find(
            shards,
            hashes,
            options.distance,
            options.tolerance,
            lambda done, total: bar.update(grouping, completed=done, total=total),
        )
    kept = write_kept(found, written)
    settings = {"hash": options.hash, "distance": options.distance, "tolerance": options.tolerance}
    write_report(found, settings, report)
    console.print(
        f"Of {plural(len(found.keeper), 'sample')} {plural(found.exact, 'has', 'have')} the same bytes as another, and "
        f"{plural(found.near, 'more is', 'more are')} nearly the same as one"
    )
    for cause, count in sorted(found.causes().items()):
        console.print(f"Not compared and kept, {cause}: {count:,} (named in {report})")
    if sheet := contact_sheet(found):
        with written_whole(report.with_suffix(".png")) as unfinished:
            sheet.save(unfinished, "PNG")
        console.print(f"{report} names them, {report.with_suffix('.png')} shows them")
    if not kept:
        raise DataError(f"No sample is left, so {written} is not written.")
    console.print(f"{plural(kept, 'sample is', 'samples are')} kept, in {written}")
    if written != Path(options.out):
        repack_with_bar(written, Path(options.out), options.samples_per_shard, kept, sources)


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="t2i data dedup",
        description="Finds pictures that are there more than once and keeps of each the one with the largest original.",
    )
    made.add_argument("shards", nargs="+", help="shards or selections (.arrow); braces")
    made.add_argument("out", help="a selection kept.arrow, or a folder for shards of their own")
    made.add_argument("--distance", type=int, default=4, help="bits of 64 in which hashes may differ")
    made.add_argument(
        "--tolerance",
        type=int,
        default=24,
        help="of 255, by which values of 8 x 8 thumbnails may differ; 255: the hash alone decides, without colours",
    )
    made.add_argument("--hash", default="phash", help="phash or dhash, of the package imagehash")
    made.add_argument("--report", metavar="FILE.json", help="default: beside OUT; a .png lies beside it")
    made.add_argument("--workers", type=int, help="processes that hash; default: one for each core")
    made.add_argument("--samples-per-shard", type=int, default=1000, help="where OUT is a folder")
    return made
