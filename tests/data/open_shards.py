"""Shards opened in short, and batches of them."""

from __future__ import annotations

from collections import Counter

from t2i.data.decode import BadSample
from t2i.data.loader import build_loader
from t2i.data.shards import Raw, Shards
from t2i.data.sources import Limits
from t2i.data.store import ShardStore
from t2i.data_config import DataConfig

QUICK = Limits(deadline_s=2.0, attempts=2)


def opened(urls, max_bad_share=0.0, limits=QUICK) -> Shards:
    return Shards([str(url) for url in urls], ShardStore(limits), max_bad_share=max_bad_share)


def everything(shards: Shards) -> tuple[list[str], Counter]:
    """Keys of what can be read, and causes of what cannot."""
    places = [(shard, i) for shard in range(len(shards)) for i in range(int(shards.sizes[shard]))]
    found = shards.read(places)
    bad = Counter(each.cause for each in found if isinstance(each, BadSample))
    return [each.key for each in found if isinstance(each, Raw)], bad


def loader(data: DataConfig, num_images=None, **options):
    defaults = {"size_px": (8, 10), "batch_size": 4, "text_dropout": 0.0, "min_original_px": 0, "seed": 5}
    return build_loader(data, num_images=num_images, **(defaults | options))


def take(data: DataConfig, count: int, **options):
    batch_size = options.get("batch_size", 4)
    return list(loader(data, count * batch_size, **options))
