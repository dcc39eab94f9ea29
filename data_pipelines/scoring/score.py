"""Columns that LAION's tables have and one's own data lack: aesthetic, punsafe, pwatermark, similarity."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.data.captions import parse_captions, parse_metadata
from t2i.data.decode import BadSample, decode_image, image_bytes
from t2i.data.index import ShardIndex
from t2i.data.sources import is_local
from t2i.errors import DataError, sentence
from t2i.few import plural
from t2i.files import written_whole
from t2i.launch.ranks import Rank

from ..inspecting.facts import CAPTION_KEYS, read_sample
from ..optional import arrow_file, need
from ..places import places
from ..shard_metadata import identity, local_copy, scan
from .scorer import Loaded, Scorer

SUFFIX = ".scores.parquet"
BATCHES_AHEAD = 2  # decoded while the networks work on another


@dataclass
class Report:
    """scored, skipped: shards of this process; samples: rows written
    nulls: what is wrong -> rows that lack a score, or samples that have no row, of both
    unreadable: shard -> why"""

    scored: int = 0
    skipped: int = 0
    samples: int = 0
    nulls: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)


def score_shards(
    urls: Sequence[str],
    out: Path | None,
    scorer: Scorer,
    batch_size: int,
    threads: int,
    rank: Rank,
    progress: Callable[[float], None],
) -> Report:
    """Writes `00000.scores.parquet` beside each shard of this process, or into the folder `out`.

    Columns: key (string), and the scores (float32), null where the picture or the caption cannot be read. Of samples
    with one key, the first has the row. Columns that a file has from the same weights and the same shard are kept,
    others are made. progress: called with the part of a shard that was done.
    Raises ConfigError where scores would have no place, DataError where no shard could be read.
    """
    files = places(urls, SUFFIX, out)
    report = Report()
    with ThreadPoolExecutor(threads) as pool:
        for url in list(files)[rank.rank :: rank.world]:
            with contextlib.ExitStack() as stack:
                try:
                    known = _known(files[url], identity(url))
                    missing = [c for c in scorer.columns if known is None or not _made_with(known, c, scorer)]
                    if not missing:
                        report.skipped += 1
                        report.nulls.update(_nulls(known))
                        progress(1)
                        continue
                    path = stack.enter_context(local_copy(url))
                    index = scan(path, url)
                except Exception as error:  # tarfile raises nearly anything on bytes that are no tar file
                    report.unreadable[url] = sentence(error)
                    progress(1)
                    continue
                nulls = Counter[str]()
                keys, scores = _score(path, index, scorer, missing, batch_size, pool, nulls, progress)
                nulls |= _nulls(known)  # of a picture that has no score each column says so
                made_of = identity(url if is_local(url) else str(path))
                _write(files[url], keys, scores, nulls, scorer, made_of, known)
                report.nulls.update(nulls)
                report.scored += 1
                report.samples += len(keys)
    if report.unreadable and not report.scored + report.skipped:
        first = next(iter(report.unreadable.values()))
        raise DataError(
            f"None of {plural(len(report.unreadable), 'shard')} can be read; of the first: {first}"
        )
    return report


def _score(
    path: Path,
    index: ShardIndex,
    scorer: Scorer,
    columns: Sequence[str],
    batch_size: int,
    pool: ThreadPoolExecutor,
    nulls: Counter[str],
    progress: Callable[[float], None],
) -> tuple[list[str], dict[str, list[float | None]]]:
    rows: dict[str, int] = {}
    for row, key in enumerate(index.keys):
        if not (index.offsets[row] >= 0).any():  # it stands in for samples that the tar file lost
            nulls[index.flaws[row]] += 1
        elif key in rows:
            nulls["duplicate"] += 1
        else:
            rows[key] = row
    scores: dict[str, list[float | None]] = {column: [] for column in columns}
    with path.open("rb") as file:

        def load(row: int) -> Loaded:
            return _load(file.fileno(), index, row, scorer, columns)

        for batch in _batches(pool, load, list(rows.values()), batch_size):
            nulls.update(loaded.cause for loaded in batch if loaded.cause)
            for column, values in scorer.score(batch, columns).items():
                scores[column].extend(values)
            progress(len(batch) / len(rows))
    if not rows:
        progress(1)
    return list(rows), scores


def _batches(
    pool: ThreadPoolExecutor, load: Callable[[int], Loaded], rows: Sequence[int], batch_size: int
) -> Iterator[list[Loaded]]:
    waiting: deque[list[Future[Loaded]]] = deque()
    for start in range(0, len(rows), batch_size):
        waiting.append([pool.submit(load, row) for row in rows[start : start + batch_size]])
        if len(waiting) > BATCHES_AHEAD:
            yield [future.result() for future in waiting.popleft()]
    while waiting:
        yield [future.result() for future in waiting.popleft()]


def _load(file: int, index: ShardIndex, row: int, scorer: Scorer, columns: Sequence[str]) -> Loaded:
    key = index.keys[row]
    try:
        members = read_sample(file, index, row)
        picture, _ = decode_image(image_bytes(members, key), key)
    except BadSample as error:
        return Loaded(None, None, None, error.cause)
    except OSError:
        return Loaded(None, None, None, "unreadable")
    caption, cause = None, None
    if "similarity" in columns:
        try:
            captions = parse_captions(members, parse_metadata(members, key), CAPTION_KEYS, key)
            caption = next(iter(captions))
        except BadSample as error:
            cause = error.cause
    return Loaded(*scorer.preprocess(picture, columns), caption, cause)


def _known(file: Path, shard: str) -> Any | None:
    """The table of scores, where it was made of this shard. shard: its identity, or the beginning of it"""
    pa, parquet = need("pyarrow", "data"), need("pyarrow.parquet", "data")
    try:
        with arrow_file(file) as source:
            table = parquet.read_table(source)
    except (OSError, pa.ArrowException):
        return None  # none, or not whole
    then = (table.schema.metadata or {}).get(b"t2i.shard", b"").decode()
    return table if then.startswith(shard) and "key" in table.column_names else None


def _nulls(known: Any | None) -> Counter[str]:
    """What was wrong when a table of scores was made. Older versions did not write it down."""
    said = None if known is None else (known.schema.metadata or {}).get(b"t2i.nulls")
    return Counter(json.loads(said)) if said else Counter()


def _made_with(table: Any, column: str, scorer: Scorer) -> bool:
    if column not in table.column_names:
        return False
    metadata = table.schema.field(column).metadata or {}
    return metadata.get(b"t2i.weights") == scorer.weights[column].encode()


def _write(
    file: Path,
    keys: list[str],
    scores: Mapping[str, list[float | None]],
    nulls: Counter[str],
    scorer: Scorer,
    shard: str,
    known: Any | None,
) -> None:
    """Also the columns of `known` that were not made anew. The file gets its name when it is complete."""
    pa, parquet = need("pyarrow", "data"), need("pyarrow.parquet", "data")
    fields, columns = [pa.field("key", pa.string())], [pa.array(keys, pa.string())]
    if known is not None and known["key"].to_pylist() == keys:
        for name in known.column_names:
            if name != "key" and name not in scores:
                fields.append(known.schema.field(name))
                columns.append(known[name].combine_chunks())
    for name, values in scores.items():
        fields.append(pa.field(name, pa.float32(), metadata={"t2i.weights": scorer.weights[name]}))
        columns.append(pa.array(values, pa.float32()))
    schema = pa.schema(fields, metadata={"t2i.shard": shard, "t2i.nulls": json.dumps(nulls)})
    with written_whole(file) as unfinished, arrow_file(unfinished, "wb") as sink:
        parquet.write_table(pa.table(columns, schema=schema), sink)
