"""What `t2i data dedup` found: every removed sample by name, and a picture of the largest groups."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from t2i.data.decode import BadSample, decode_image, image_bytes
from t2i.files import written_whole

from ..shard_metadata import first_rows, local_copy, scan
from .dedup import Duplicates

GROUPS, PICTURES = 24, 8  # on the sheet, the largest groups and the first of each
TILE_PX, GAP_PX, TEXT_PX = 128, 8, 16


def write_report(found: Duplicates, settings: dict[str, Any], path: Path) -> None:
    """JSON: counts, unusable pictures, and for each removed sample the one that is kept in its place, in how many bits
    their hashes differ (more than the distance where others lie between) and whether the bytes are the same."""
    counts = {
        **settings,
        "samples": len(found.keeper),
        "kept": int(found.kept.sum()),
        "exact_duplicates": found.exact,
        "near_duplicates": found.near,
        "groups": len(np.unique(found.keeper[~found.kept])),
        "unusable": dict(found.causes()),
    }
    with written_whole(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(counts, indent=1)[:-2] + ',\n "unusable_samples": [')
        _write_list(
            file, ({"shard": s, "key": k, "cause": c} for (s, k), c in _named(found, found.flaws.items()))
        )
        file.write('],\n "removed": [')
        _write_list(file, _removed(found))
        file.write("]\n}\n")


def _write_list(file: Any, records: Iterator[dict[str, Any]]) -> None:
    """One record a line, without holding all of them."""
    for number, record in enumerate(records):
        file.write((",\n  " if number else "\n  ") + json.dumps(record, ensure_ascii=False))


def _named(found: Duplicates, items: Any) -> Iterator[tuple[tuple[str, str], str]]:
    return ((found.name(row), cause) for row, cause in items)


def _removed(found: Duplicates) -> Iterator[dict[str, Any]]:
    for row in np.flatnonzero(~found.kept).tolist():
        keeper = int(found.keeper[row])
        (shard, key), (kept_shard, kept_key) = found.name(row), found.name(keeper)
        code, digest = _of(found, row)
        kept_code, kept_digest = _of(found, keeper)
        yield {
            "shard": shard,
            "key": key,
            "kept_shard": kept_shard,
            "kept_key": kept_key,
            "bits": (code ^ kept_code).bit_count(),
            "same_bytes": bool((digest == kept_digest).all()),
        }


def _of(found: Duplicates, row: int) -> tuple[int, np.ndarray]:
    shard = int(np.searchsorted(found.starts, row, side="right")) - 1
    place = row - int(found.starts[shard])
    return int(found.hashes[shard].codes[place]), found.hashes[shard].digests[place]


def contact_sheet(found: Duplicates) -> Image.Image | None:
    """RGB: the largest groups, of each the kept picture first, in a frame; above it how many they are, above the
    others in how many bits the hash differs. None where there are no duplicates."""
    keepers, sizes = np.unique(found.keeper[~found.kept], return_counts=True)
    if not len(keepers):
        return None
    largest = keepers[np.argsort(-sizes, kind="stable")[:GROUPS]]
    rows = [
        [int(keeper), *(r for r in np.flatnonzero(found.keeper == keeper).tolist() if r != keeper)]
        for keeper in largest
    ]
    lines = [line[:PICTURES] for line in rows]
    pictures = _pictures(found, [row for line in lines for row in line])
    places = _places([len(line) for line in lines])
    step_x, step_y = TILE_PX + GAP_PX, TILE_PX + TEXT_PX + GAP_PX
    width = GAP_PX + max(x + len(line) for (x, _), line in zip(places, lines, strict=True)) * step_x
    sheet = Image.new("RGB", (int(width), GAP_PX + (places[-1][1] + 1) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for (x, y), line, group in zip(places, lines, rows, strict=True):
        for i, row in enumerate(line):
            left, top = GAP_PX + int((x + i) * step_x), GAP_PX + y * step_y
            bits = (_of(found, row)[0] ^ _of(found, line[0])[0]).bit_count()
            draw.text((left, top), f"kept, of {len(group)}" if i == 0 else f"{bits} bits", fill="black")
            if picture := pictures.get(row):
                sheet.paste(picture, (left, top + TEXT_PX))
            if i == 0:
                frame = (left - 2, top + TEXT_PX - 2, left + TILE_PX + 1, top + TEXT_PX + TILE_PX + 1)
                draw.rectangle(frame, outline="green", width=2)
    return sheet


def _places(lengths: list[int]) -> list[tuple[float, int]]:
    """Column and line of each group's first picture, half a picture between groups, PICTURES or fewer in a line."""
    places: list[tuple[float, int]] = []
    x, y = 0.0, 0
    for length in lengths:
        if x and x + length > PICTURES:
            x, y = 0.0, y + 1
        places.append((x, y))
        x += length + 0.5
    return places


def _pictures(found: Duplicates, rows: list[int]) -> dict[int, Image.Image]:
    """row -> RGB within TILE_PX, shard by shard."""
    pictures: dict[int, Image.Image] = {}
    by_shard: dict[str, list[tuple[int, str]]] = {}
    for row in rows:
        shard, key = found.name(row)
        by_shard.setdefault(shard, []).append((row, key))
    for url, wanted in by_shard.items():
        with local_copy(url) as path, path.open("rb") as file:
            index = scan(path, url)
            places = first_rows(index)
            for row, key in wanted:
                try:
                    data = image_bytes(index.read(file.fileno(), places[key]), key)
                    picture, _ = decode_image(data, key, (TILE_PX, TILE_PX))
                except (BadSample, OSError, KeyError):  # the shard has changed since it was hashed
                    continue
                picture.thumbnail((TILE_PX, TILE_PX))
                pictures[row] = picture
    return pictures
