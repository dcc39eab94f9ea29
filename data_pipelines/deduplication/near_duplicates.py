"""Which pictures are nearly the same, by perceptual hashes and thumbnails: exact, and far from quadratic."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..optional import need

BITS = 64
# Three bands of 21 bits. Codes at a distance of at most d differ in at most d // 3 bits of one of them at least, and
# all codes that do so are looked up, so that no pair is missed.
BANDS, BAND_BITS = 3, 21
QUERIES = 65_536  # at once
PAIRS = 262_144  # of thumbnails compared at once
MAX_DISTANCE = 11  # beyond, a band may differ in 4 bits: 7,547 look-ups for each band of each code


def group(
    codes: np.ndarray,
    thumbnails: Callable[[np.ndarray], np.ndarray],
    distance: int,
    tolerance: int,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """(n,) labels, equal for pictures that a chain of pairs of near duplicates links.

    codes: (n,) uint64
    thumbnails: rows (k,) -> (k, ...) uint8 of these pictures
    distance: the most bits in which the codes of a pair may differ, 0..MAX_DISTANCE
    tolerance: the most by which a value of their thumbnails may differ, 0..255
    progress: called with the codes looked up and all distinct codes
    """
    components = need("scipy.sparse.csgraph", "dedup").connected_components
    coo_array = need("scipy.sparse", "dedup").coo_array
    order = np.argsort(codes, kind="stable")
    distinct, starts = np.unique(codes[order], return_index=True)
    counts = np.diff(starts, append=len(order))

    def members(code: int) -> np.ndarray:
        return order[starts[code] : starts[code] + counts[code]]

    def alike(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(k,) bool for k pairs of rows"""
        difference = thumbnails(left).astype(np.int16) - thumbnails(right)
        return np.abs(difference).reshape(len(left), -1).max(axis=1, initial=0) <= tolerance

    edges: list[np.ndarray] = [np.empty((2, 0), np.int64)]
    clusters: dict[int, list[np.ndarray]] = {}  # of a code that several pictures have: those that look alike
    for code in np.flatnonzero(counts > 1).tolist():
        clusters[code] = list(_clusters(members(code), alike))
        edges += [np.stack([np.full(len(rows), rows[0]), rows]) for rows in clusters[code]]
    for pairs in _pairs(distinct, distance, progress):
        single = (counts[pairs] == 1).all(axis=0)
        for start in range(0, int(single.sum()), PAIRS):
            rows = order[starts[pairs[:, single][:, start : start + PAIRS]]]
            edges.append(rows[:, alike(*rows)])
        for one, other in pairs[:, ~single].T.tolist():
            for left in clusters.get(one, [members(one)]):
                for right in clusters.get(other, [members(other)]):
                    edges += _link(left, right, alike)
    left, right = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(codes), len(codes)))
    return components(graph, directed=False)[1]


def _pairs(distinct: np.ndarray, distance: int, progress: Callable[[int, int], None]) -> Iterator[np.ndarray]:
    """(2, k) positions in `distinct`, each pair once, of codes that differ in at most `distance` bits."""
    faiss = need("faiss", "dedup")
    index = faiss.IndexBinaryMultiHash(BITS, BANDS, BAND_BITS)
    index.nflip = distance // BANDS
    as_bytes = distinct.view(np.uint8).reshape(-1, BITS // 8)
    index.add(as_bytes)
    for start in range(0, len(distinct), QUERIES):
        limits, _, found = index.range_search(as_bytes[start : start + QUERIES], distance + 1)  # below it
        asked = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits).astype(np.int64))
        yield np.stack([asked, found])[:, found > asked]
        progress(min(start + QUERIES, len(distinct)), len(distinct))


def _clusters(
    rows: np.ndarray, alike: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """`rows` split into those that a chain of alike pairs links. Linear where all are alike."""
    while len(rows):
        cluster, rows = [rows[:1]], rows[1:]
        for new in cluster:  # grows meanwhile
            for row in new:
                if not len(rows):
                    break
                found = np.concatenate(
                    [
                        alike(np.full(len(part), row), part)
                        for part in np.split(rows, range(PAIRS, len(rows), PAIRS))
                    ]
                )
                if found.any():
                    cluster.append(rows[found])
                    rows = rows[~found]
        yield np.concatenate(cluster)


def _link(
    left: np.ndarray, right: np.ndarray, alike: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """One pair of alike pictures between two clusters, if there is one: (2, 1)."""
    for row in left:
        for start in range(0, len(right), PAIRS):
            part = right[start : start + PAIRS]
            found = np.flatnonzero(alike(np.full(len(part), row), part))
            if len(found):
                return [np.array([[row], [part[found[0]]]])]
    return []
