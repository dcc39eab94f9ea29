"""The members of a tar file as samples: grouped by key wherever they lie, links followed, what is lost counted.

webdataset takes members of one key for a sample only where they follow one another. Here they are one sample wherever
they lie in the file (such as all pictures, then all captions), unless that gives an extension twice: what repeats one
is a sample of its own, as webdataset has it. Names are kept in arrays, so that a tar of a million members is scanned
within some hundred MiB.
"""

from __future__ import annotations

import posixpath
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from tarfile import TarInfo

import numpy as np
from webdataset.tariterators import base_plus_ext

from t2i.data.members import PICTURE_ENDINGS, SAMPLE_ENDINGS
from t2i.data.tar import BLOCK, Gap
from t2i.errors import DataError

META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset's own bookkeeping, never part of a sample
MAX_EXTENSIONS = 1000
MAX_PLACES = 10**8  # samples times extensions
MAX_LINKS = 40  # one after the other, as Linux has it
MAX_LOST = 100  # times the samples that are there: more stand-ins say nothing more


class Samples:
    """The rows of an index, as they are found.

    keys: of each sample
    flaws: row -> cause
    rows, columns, offsets, sizes: of each member, its sample, its extension's number, where its data begin, and their
        bytes; linked: positions among these of members that are read where another one lies, or whose own header has
        another name
    extensions: lower-cased -> number, in the order of their first appearance
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: list[str] = []
        self.flaws: dict[int, str] = {}
        self.rows, self.columns, self.offsets, self.sizes = (array("q") for _ in range(4))
        self.linked: list[int] = []
        self.extensions: dict[str, int] = {}
        self._rows_of: dict[str, list[int] | int] = {}
        self._has: list[int] = []  # of each row its extensions, as bits
        self._links: list[_Link] = []
        self._renamed: set[int] = set()  # offsets of members whose own header has another name
        self._gaps: list[_Gap] = []
        self._key: str | None = None  # of the members that come just now
        self._run: dict[int, tuple[int, int]] = {}  # extension -> offset and size
        self._repeats = False  # the run repeats a name that stood in the one before
        self._joined = 0  # runs that went to a sample that was there
        self._last: int | None = None  # the row of the run before

    def add(self, found: TarInfo | Gap) -> None:
        """The next member, or gap, of the file."""
        if isinstance(found, Gap):
            self._end_run()
            if found.cause == "truncated":
                if self._last is None:
                    self._last = self._new_row(self.name)
                self.flaws[self._last] = found.cause
            if found.size:
                self._gaps.append(_Gap(found.size, self._last, found.cause == "truncated", found.cut))
            return
        key, extension = base_plus_ext(found.name)
        if key is None or META_MEMBER.match(found.name):
            return
        column = self.extensions.setdefault(extension.lower(), len(self.extensions))
        if column >= MAX_EXTENSIONS:
            raise DataError(
                f"{self.name} has members with more than {MAX_EXTENSIONS} different endings, such as {extension}: a "
                "key ends at the first dot of a name; pack it with keys that have none."
            )
        if key != self._key or column in self._run:
            repeats = key == self._key
            self._end_run()
            self._key, self._repeats = key, repeats
        if found.isreg() and not found.issparse():
            if "path" in found.pax_headers:
                self._renamed.add(found.offset_data)
            self._run[column] = found.offset_data, found.size
        else:
            self._run[column] = -1 - len(self._links), 0
            self._links.append(_Link(found))

    def finish(self, members: Iterable[TarInfo | Gap]) -> None:
        """To be called behind the last member. members: the same ones again, for what links lead to"""
        self._end_run()
        if self._links:
            self._follow(members)
        cuts = sum(gap.cut for gap in self._gaps)
        if cuts > 2 and 2 * cuts > len(self.rows):  # a writer that does not put zeros behind its members
            self._gaps = [gap for gap in self._gaps if not gap.cut]
        if self._gaps:
            self._stand_in()
        if len(self.keys) * len(self.extensions) > MAX_PLACES:
            raise DataError(
                f"{self.name} has {len(self.keys)} samples with {len(self.extensions)} different endings, more than "
                "an index holds; a key ends at the first dot of a name."
            )

    def arrays(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, frozenset[int]]:
        """Extensions, (n, E) offsets and sizes, and the flat positions of what is linked (see `ShardIndex`)."""
        extensions = tuple(sorted(self.extensions))
        order = np.array([extensions.index(each) for each in self.extensions], dtype=np.int64)
        rows = np.array(self.rows, dtype=np.int64)
        columns = order[np.array(self.columns, dtype=np.int64)]
        offsets = np.full((len(self.keys), len(extensions)), -1, dtype=np.int64)
        sizes = np.zeros_like(offsets)
        offsets[rows, columns], sizes[rows, columns] = self.offsets, self.sizes
        flat = rows * len(extensions) + columns
        return extensions, offsets, sizes, frozenset(flat[self.linked].tolist())

    def _new_row(self, key: str) -> int:
        self.keys.append(key)
        self._has.append(0)
        return len(self.keys) - 1

    def _end_run(self) -> None:
        if self._key is None:
            return
        has = sum(1 << column for column in self._run)
        row = self._row_for(self._key, has)
        if row is not None:
            self._has[row] |= has
            for column, (offset, size) in self._run.items():
                self._put(row, column, offset, size)
        self._last = row if row is not None else self._last
        for gap in reversed(self._gaps):
            if gap.after is not None:
                break
            gap.after = self._last
        self._key, self._run, self._repeats = None, {}, False

    def _row_for(self, key: str, has: int) -> int | None:
        """The row that members of `key` with these extensions belong to; None where several lack them, and nothing
        says which: then these are flawed."""
        known = self._rows_of.get(key)
        rows = [known] if isinstance(known, int) else known or []
        fitting = [row for row in rows if not self._has[row] & has and row not in self.flaws]
        if len(fitting) > 1 and not self._repeats:
            self.flaws.update((row, "duplicate") for row in fitting)
            return None
        if fitting and not self._repeats:
            self._joined += 1
            return fitting[0]
        row = self._new_row(key)
        self._rows_of[key] = [*rows, row] if rows else row
        if self._repeats:
            self.flaws[row] = "duplicate"
        return row

    def _put(self, row: int, column: int, offset: int, size: int) -> None:
        if offset < 0:
            link = self._links[-1 - offset]
            link.row, link.column = row, column
            return
        if offset in self._renamed:
            self.linked.append(len(self.rows))
        for values, value in zip(
            (self.rows, self.columns, self.offsets, self.sizes), (row, column, offset, size), strict=True
        ):
            values.append(value)

    def _follow(self, members: Iterable[TarInfo | Gap]) -> None:
        """Links to members of the same tar are read there; other ones, and sparse members, are a flaw of their sample
        where it needs them."""
        targets = {link.name: link.target for link in self._links}
        found: dict[str, list[tuple[int, int]]] = {name: [] for name in targets.values() if name is not None}
        for member in members:
            if isinstance(member, TarInfo) and member.isreg() and not member.issparse():
                name = _plain(member.name)
                if name in found:
                    found[name].append((member.offset_data, member.size))
        names = list(self.extensions)
        for link in self._links:
            if link.row is None:
                continue
            there = _followed(link, targets, found)
            if there:
                self.linked.append(len(self.rows))
                self._put(link.row, link.column, *there)
            elif names[link.column].rpartition(".")[2] in SAMPLE_ENDINGS:
                self.flaws.setdefault(link.row, link.cause)

    def _stand_in(self) -> None:
        """Rows without members for the samples that gaps have swallowed, so that each counts: as many as the gaps have
        room for, by the mean of the samples that are there, less what those beside them lack."""
        lost = self._lost()
        total, upto, given = sum(gap.size for gap in self._gaps), 0, 0
        for gap in self._gaps:
            upto += gap.size
            here = round(lost * upto / total) - given
            given += here
            place = "at its end" if gap.after is None else f"before {self.keys[gap.after]}"
            for number in range(1, here + 1):
                row = self._new_row(f"{self.name} {place}" + (f", {number}" if number > 1 else ""))
                self.flaws[row] = "damaged"

    def _lost(self) -> int:
        kinds = [_kind(extension) for extension in self.extensions]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        rows, columns, sizes = (np.array(v, dtype=np.int64) for v in (self.rows, self.columns, self.sizes))
        taken = np.zeros((len(self.keys), len(numbers)))  # bytes in the file
        places = rows, np.array([numbers[kind] for kind in kinds], dtype=np.int64)[columns]
        np.add.at(taken, places, BLOCK - (-sizes // BLOCK) * BLOCK)
        has: np.ndarray = taken > 0
        good = np.array(has.any(axis=1))
        good[list(self.flaws)] = False
        if not good.any():
            return len(self._gaps)
        usual = 2 * has[good].sum(axis=0) > good.sum()
        whole = good & has[:, usual].all(axis=1)
        whole = whole if whole.any() else good
        lacks: np.ndarray = good & ~has[:, usual].all(axis=1)
        missing = ~has[:, usual] @ taken[whole][:, usual].mean(axis=0)
        of_sample = taken[whole].sum(axis=1)
        beside = [[row for row in (gap.before, gap.after) if row is not None] for gap in self._gaps]
        if 2 * self._joined > len(
            self.keys
        ):  # parts of a sample lie far apart: what is lost of it shows elsewhere
            blamed: np.ndarray = lacks
            least = len(self._gaps) - int(lacks.sum())
        else:
            blamed = np.zeros_like(lacks)
            blamed[[row for rows in beside for row in rows]] = True
            blamed &= lacks
            # A neighbour that lacks more than its JSON counts by itself, if that and nothing else has room in the gap.
            json = np.array([kind.rpartition(".")[2] == "json" for kind in numbers])
            counts = good & ~has[:, usual & ~json].all(axis=1)
            needs = np.where(counts, ~has[:, usual] @ taken[whole][:, usual].min(axis=0), np.inf)
            least = sum(
                not gap.counted
                and (gap.cut or not needs[rows].min(initial=np.inf) <= gap.size < np.min(of_sample))
                for gap, rows in zip(self._gaps, beside, strict=True)
            )
        room = sum(gap.size for gap in self._gaps) - missing[blamed].sum()
        return min(max(least, round(room / of_sample.mean())), MAX_LOST * int(good.sum()))


def _kind(extension: str) -> str:
    return "picture" if extension.rpartition(".")[2] in PICTURE_ENDINGS else extension


@dataclass
class _Gap:
    """size, cut: see `t2i.data.tar.Gap`; before, after: rows of the members beside it; counted: one of them counts for
    it already"""

    size: int
    before: int | None
    counted: bool
    cut: bool
    after: int | None = None


class _Link:
    """A member whose data lie elsewhere. target: the name that it leads to; None where that is outside of the tar, or
    for a sparse member."""

    def __init__(self, member: TarInfo) -> None:
        self.hard, self.offset = member.islnk(), member.offset
        self.cause = "link" if self.hard or member.issym() else "sparse"
        self.name = _plain(member.name)
        self.target: str | None = None
        if self.hard:
            self.target = _plain(member.linkname)
        elif member.issym() and not member.linkname.startswith("/"):
            self.target = _plain(posixpath.join(posixpath.dirname(self.name), member.linkname))
        self.row: int | None = None
        self.column = 0


def _plain(name: str) -> str:
    return posixpath.normpath(name.lstrip("/"))


def _followed(
    link: _Link, targets: dict[str, str | None], found: dict[str, list[tuple[int, int]]]
) -> tuple[int, int] | None:
    """Offset and size of the data where links to links end; None where they lead out of the tar or in a circle,
    or are too many.
    A hard link means what stands before it under a name, a symbolic one what stood there last."""
    name = link.target
    for _ in range(MAX_LINKS):
        if name is None:
            break
        places = [place for place in found[name] if place[0] < link.offset or not link.hard]
        if places:
            return places[-1]
        name = targets.get(name)
    return None
