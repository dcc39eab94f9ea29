"""The embedded data: made on first use, then shards like any other."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from t2i.files import user_cache
from t2i.schema import check

from .console import console

if TYPE_CHECKING:
    from t2i.config import RunConfig

SHAPES_SIZE_PX = 64


def folder_of(source: str, size_px: int = SHAPES_SIZE_PX) -> Path:
    """Where the shards of an embedded source lie."""
    return user_cache() / (source if source == "emoji" else f"{source}-{size_px}")


def make(source: str, size_px: int = SHAPES_SIZE_PX) -> Path:
    """Writes the shards of an embedded source if they are absent; returns their folder."""
    folder = folder_of(source, size_px)
    if folder.is_dir():
        return folder
    from t2i_pipelines.sources import emoji, shapes

    console.print(f"Making the embedded data {source} in {folder}")
    if source == "emoji":
        emoji.build(folder)
    else:
        shapes.build(folder, size_px=size_px)
    return folder


def with_embedded_data(config: RunConfig) -> RunConfig:
    """The same configuration with `data.shards` naming real shards. Where the emoji were never made, which
    takes npm and the network, it says so and takes shapes."""
    source = config.data.source
    if source is None:
        return config
    for key, own in {"shards": "shards", "heldout_shards": "shards", "mixture": "mixture"}.items():
        given = getattr(config.data, key)
        allowed = f"nothing with data={source}, which has pictures of its own; your own need data={own}"
        check(given is None or given == {}, f"data.{key}", given, allowed)
    if source == "emoji" and not folder_of("emoji").is_dir():
        print(
            "The emoji are not made yet (`t2i data make emoji` fetches them by npm); data=shapes is taken instead.",
            file=sys.stderr,
        )
        source = "shapes"
    folder = make(source, max(SHAPES_SIZE_PX, config.resolution.size_px))
    data = dataclasses.replace(
        config.data,
        source=source,
        shards=sorted(str(path) for path in (folder / "train").glob("*.tar")),
        heldout_shards=sorted(str(path) for path in (folder / "heldout").glob("*.tar")),
    )
    return dataclasses.replace(config, data=data)
