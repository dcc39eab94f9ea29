"""What img2dataset's `00000_stats.json` beside a shard says of it."""

from __future__ import annotations

import json

from t2i.data import sources
from t2i.data.folder_index import MAX_SAMPLES
from t2i.data.index import ShardIndex
from t2i.data.sources import SourceError
from t2i.data.store import ShardStore


def successes(url: str, store: ShardStore) -> int | None:
    """Samples in a shard by img2dataset's statistics beside it."""
    place = sources.beside(url, "_stats.json")
    try:
        found = json.loads(sources.read_bytes(place, store.limits))["successes"] if place else None
    except (SourceError, ValueError, KeyError, TypeError, RecursionError):
        return None
    known = isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= MAX_SAMPLES
    return found if known else None


def samples_in(index: ShardIndex, url: str, store: ShardStore) -> int:
    """Samples of a shard; as many as img2dataset's statistics say that there were, if the tar file has fewer: a tar
    file that ends too early at the right byte looks whole."""
    return max(len(index), successes(url, store) or 0)
