"""A shard between its first and its last picture, and the files it becomes."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..pictures import Picture
from ..places import printable
from ..shard_writer import Failure, Sample, free_names, whole_shard, write_shard, write_table
from ..tables import json_records

if TYPE_CHECKING:
    import pyarrow as pa


class OpenShard:
    """A shard under way. Its pictures lie on disk in the order in which they came, so that neither slow hosts nor
    the order of the table keep them in memory; `finish` puts them in order.

    rows: of the table, as many as the shard has places
    digest: of these rows and of what is made of them, for the statistics
    """

    def __init__(
        self, number: int, rows: pa.Table, url_column: str, caption_column: str, digest: str, out: Path
    ) -> None:
        self.number = number
        self.digest = digest
        self.out = out
        self.urls: list[str | None] = rows[url_column].to_pylist()
        self.captions: list[str | None] = rows[caption_column].to_pylist()
        others = rows.drop_columns(list({url_column, caption_column}))
        self.columns = others.rename_columns(list(free_names(others.column_names).values()))
        self.outcomes: dict[int, Sample | Failure] = {}  # by place in the shard
        self.statuses: Counter[str] = Counter()
        self.spooled: dict[int, tuple[int, int]] = {}  # by place: offset and bytes in the spool
        self.spool = tempfile.TemporaryFile(dir=out)  # noqa: SIM115  closed by `finish`; without a name
        self.changing = threading.Lock()
        self.undone = len(self.urls)  # for its keeper to count down
        self.start_s = time.time()

    def succeed(self, place: int, picture: Picture, image: bytes) -> None:
        """Keeps `image` as sample number `place`. May be called from several threads, as may `fail`."""
        sample = Sample(
            b"",
            picture.extension,
            self.captions[place],
            picture.width,
            picture.height,
            picture.original_width,
            picture.original_height,
            self.urls[place],
            exif=picture.exif,
            sha256=picture.sha256,
        )
        with self.changing:
            self.spooled[place] = self.spool.tell(), self.spool.write(image)
            self.outcomes[place] = sample
            self.statuses["success"] += 1

    def fail(self, place: int, status: str, cause: str, message: str) -> None:
        failure = Failure(status, printable(message), self.captions[place], self.urls[place])
        with self.changing:
            self.outcomes[place] = failure
            self.statuses[cause] += 1

    def finish(self) -> None:
        """Writes the table, the statistics and the tar, all or none of them."""
        outcomes = [self.outcomes[place] for place in range(len(self.urls))]
        failed = Counter(outcome.status for outcome in outcomes if isinstance(outcome, Failure))
        with whole_shard(self.out / f"{self.number:05d}.tar") as (tar, stats, table):
            write_table(outcomes, self.columns, table, self.number)
            write_shard(self._samples(), tar, self.number)
            end_s = time.time()
            known = {
                "count": len(outcomes),
                "successes": len(self.spooled),
                "failed_to_download": failed["failed_to_download"],
                "failed_to_resize": failed["failed_to_resize"],
                "duration": end_s - self.start_s,
                "start_time": self.start_s,
                "end_time": end_s,
                "status_dict": dict(sorted(self.statuses.items())),
                "rows": self.digest,
            }
            stats.write_text(json.dumps(known, indent=4))
        self.spool.close()

    def _samples(self) -> Iterator[tuple[int, Sample]]:
        records = json_records(self.columns) if self.columns.num_columns else [{}] * len(self.urls)
        for place, columns in enumerate(records):
            sample = self.outcomes[place]
            if isinstance(sample, Sample):
                offset, length = self.spooled[place]
                self.spool.seek(offset)
                yield place, replace(sample, image=self.spool.read(length), columns=columns)
