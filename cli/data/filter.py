"""`t2i data filter`: what a preset, bounds or an expression keep, of a table or of shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2i.errors import ConfigError, DataError
from t2i.few import plural

from ..arguments import Parser
from ..console import console, progress_bar

if TYPE_CHECKING:
    from t2i_pipelines.filtering.filter import Report


def run(arguments: list[str]) -> None:
    """Filters under a progress bar and reports what each rule removed."""
    options = parser().parse_args(arguments)
    from t2i.data.sources import expand
    from t2i_pipelines.filtering.filter import filter_shards, filter_table
    from t2i_pipelines.filtering.presets import QUANTITIES, Rule, bound, languages, preset
    from t2i_pipelines.table_files import SUFFIXES

    rules = list(preset(options.preset)) if options.preset else []
    for quantity in QUANTITIES:
        name = quantity.replace("-", "_")
        rules += bound(quantity, getattr(options, f"min_{name}"), getattr(options, f"max_{name}"))
    rules += [languages(options.language)] if options.language else []
    rules += [Rule(expression, expression) for expression in options.where]
    is_table = [source.lower().endswith(SUFFIXES) for source in options.source]
    if any(is_table) != all(is_table):
        raise ConfigError("SOURCE names tables and shards; allowed: one kind.")
    with progress_bar() as bar:
        task = bar.add_task("rows" if is_table[0] else "shards", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if is_table[0]:
            written = Path(options.out)
            if written.suffix != ".parquet":
                raise ConfigError(f"OUT is {written}; allowed for a table: a name that ends in .parquet.")
            report = filter_table("::".join(options.source), written, rules, progress)
        else:
            written = selection_path(options.out)
            sources = expand(options.source, "SOURCE")
            report = filter_shards(sources, written, rules, progress)
    _print(report)
    if not report.kept:
        raise DataError(f"No sample is left, so {written} is not written.")
    console.print(f"{report.kept:,} of {report.rows:,} are kept, in {written}")
    if not is_table[0] and written != Path(options.out):
        repack_with_bar(written, Path(options.out), options.samples_per_shard, report.kept, sources)


def selection_path(out: str) -> Path:
    """Where the selection goes: to `out`, or into that folder. Raises ConfigError for another kind of file."""
    path = Path(out)
    if path.suffix and not path.is_dir() and path.suffix != ".arrow":
        raise ConfigError(f"OUT is {out}; allowed for shards: a name that ends in .arrow, or a folder.")
    return path if path.suffix == ".arrow" else path / "selection.arrow"


def repack_with_bar(
    selection: Path, out: Path, samples_per_shard: int, total: int, sources: Sequence[str]
) -> None:
    """`t2i_pipelines.filtering.repack.repack` under a progress bar, and what it left out.
    sources: what the command line names"""
    from t2i_pipelines.filtering.repack import repack

    with progress_bar() as bar:
        task = bar.add_task("samples", total=total)
        report = repack(
            selection, out, samples_per_shard, lambda done: bar.advance(task, done), pipes=sources
        )
    there = f" ({plural(report.skipped, 'was', 'were')} there)" if report.skipped else ""
    console.print(
        f"{plural(report.packed, 'sample is', 'samples are')} in {plural(report.shards, 'shard')}{there} in {out}"
    )
    for cause, count in sorted(report.failed.items()):
        console.print(f"Left out, {cause}: {count:,} (named in {out}/*_stats.json)")


def _print(report: Report) -> None:
    if report.from_members:
        console.print(
            f"Without a .parquet, so read from the samples' own JSON: {plural(len(report.from_members), 'shard')}, "
            f"{report.from_members[0]} the first",
        )
    if report.left_out:
        console.print(f"Columns of bytes, not written: {', '.join(report.left_out)}")
    for cause, count in sorted(report.unusable.items()):
        console.print(f"Of the table, not read, {cause}: {count:,}")
    if report.absent:
        console.print(f"In the selection, but not in the metadata: {report.absent:,}")
    left = report.rows
    for number, tally in enumerate(report.tallies):
        if number == 0 and not tally.removed + tally.unknown:
            continue  # no table of downloads, or none that failed
        unknown = f", {tally.unknown:,} more as it is unknown" if tally.unknown else ""
        left -= tally.removed + tally.unknown
        console.print(f"{tally.name}: removes {tally.removed:,}{unknown}; {left:,} left")


def parser() -> argparse.ArgumentParser:
    from t2i_pipelines.filtering.presets import PRESETS, QUANTITIES

    made = Parser(
        prog="t2i data filter",
        description="Keeps what rules over the metadata say, in this order: the preset, the bounds, --where. A sample "
        "whose value a rule needs but does not find (NULL, NaN) is removed, and counted apart.",
    )
    made.add_argument(
        "source",
        nargs="+",
        help="shards or selections (.arrow), or a table (.parquet, .csv, .tsv, .jsonl); braces",
    )
    made.add_argument(
        "out",
        help="of a table, a .parquet; of shards, a selection kept.arrow, or a folder for shards of their own with keys "
        "numbered anew",
    )
    made.add_argument("--preset", help=f"a published recipe: {', '.join(PRESETS)}")
    for quantity, (_, text) in QUANTITIES.items():
        made.add_argument(f"--min-{quantity}", type=float, metavar="X", help=text)
        made.add_argument(f"--max-{quantity}", type=float, metavar="X", help="likewise")
    made.add_argument("--language", metavar="CODES", help="one or several of: en,de,...")
    made.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="SQL",
        help='a condition on the columns: "similarity > 0.3 AND LENGTH(caption) < 300"; may be repeated',
    )
    made.add_argument("--samples-per-shard", type=int, default=1000, help="where OUT is a folder")
    return made
