"""Keeping what rules over the metadata say: of a table before it is downloaded, or of shards.

Pictures are never looked at, and one slice of a table or the metadata of one shard is in memory at a time.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.errors import DataError
from t2i.files import written_whole

from ..optional import arrow_file, need
from ..selection import NothingToWrite, listed_once, write_selection
from ..shard_metadata import metadata_of
from ..tables import open_table
from .judge import Judge, Tally
from .presets import Rule

ROWS = 131_072  # of a table, read at once
# Of a .csv: text whatever it looks like. "1e5" is a caption, too, and "nan" a language.
TEXT_COLUMNS = {"caption", "text", "url", "key", "language", "lang", "license", "status", "sha256"}


@dataclass
class Report:
    """rows: looked at; kept: those that met all rules; tallies: what each rule removed, in order
    absent: samples of a selection that the metadata of their shard do not have
    from_members: shards without a .parquet, whose metadata come from the JSON of their samples
    left_out: columns of a table that are not written, as they hold bytes
    unusable: what of a table cannot be read, by cause (`tables.Table.unusable`)
    """

    rows: int = 0
    kept: int = 0
    tallies: list[Tally] = field(default_factory=list)
    absent: int = 0
    from_members: list[str] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    unusable: Counter[str] = field(default_factory=Counter)


def filter_table(
    source: str, out: Path, rules: Sequence[Rule], progress: Callable[[int, int], None]
) -> Report:
    """Writes the rows of a table (see `tables.open_table`) that meet all rules to the parquet `out`, unless there are
    none. It gets its name when it is complete. progress is called with the rows done with and all rows."""
    parquet = need("pyarrow.parquet", "data")
    judge = Judge(rules)
    report = Report(tallies=judge.tallies)
    with tempfile.TemporaryDirectory(prefix="t2i-") as copies:
        table = open_table(source, Path(copies), TEXT_COLUMNS)
        report.left_out = table.left_out
        if any(out.exists() and file.path.samefile(out) for file in table.files):
            raise DataError(f"{out} is also the source; allowed: another name.")
        with suppress(NothingToWrite), written_whole(out) as unfinished:
            with (
                arrow_file(unfinished, "wb") as file,
                parquet.ParquetWriter(file, table.schema, compression="zstd") as writer,
            ):
                for part in table.slices(ROWS):
                    kept = part.filter(judge.keeps(part, source))
                    writer.write_table(kept)
                    report.rows += part.num_rows
                    report.kept += kept.num_rows
                    progress(report.rows, table.rows)
            if not report.kept:
                raise NothingToWrite
        report.unusable = table.unusable
    return report


def filter_shards(
    shards: Sequence[str], out: Path, rules: Sequence[Rule], progress: Callable[[int, int], None]
) -> Report:
    """Writes the selection `out` of the samples that meet all rules, unless there are none.

    shards: paths and URLs of shards or of selections, expanded
    progress: called with the shards done with and all shards
    Raises DataError where metadata cannot be read or lack a column.
    """
    pa, compute = need("pyarrow", "data"), need("pyarrow.compute", "data")
    judge = Judge(rules)
    report = Report(tallies=judge.tallies)
    sources = listed_once(shards)

    def kept_keys() -> Iterator[Any]:
        for done, source in enumerate(sources, 1):
            table, packed = metadata_of(source.url)
            if not packed:
                report.from_members.append(source.url)
            if source.keys is not None:
                table = table.filter(compute.is_in(table["key"], value_set=source.keys.combine_chunks()))
                report.absent += len(source.keys) - table.num_rows
            kept = table["key"].filter(judge.keeps(table, source.url))
            report.rows += table.num_rows
            report.kept += len(kept)
            progress(done, len(sources))
            yield pa.concat_arrays([pa.array([], pa.string()), *kept.chunks])

    write_selection(out, [source.url for source in sources], kept_keys())
    return report
