"""Configuration of data as most tests have it: read in this process, nothing kept or left out."""

from __future__ import annotations

from typing import Any

from t2i.data_config import DataConfig

NEEDED: dict[str, Any] = {
    "caption_keys": ["txt", "json:caption"],
    "filter_by_size": True,
    "num_workers": 0,
    "cache_mib": 0,
}


def data_config(source: Any = None, shards: Any = None, **options: Any) -> DataConfig:
    """Of shards of one's own, unless `source` is named."""
    return DataConfig(source=source, shards=shards, **NEEDED | options)
