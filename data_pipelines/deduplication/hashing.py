"""Perceptual hashes of the pictures of a shard, kept in a small Arrow file so that they are computed once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i.data.captions import parse_metadata
from t2i.data.decode import BadSample, decode_image, image_bytes
from t2i.data.index import original_size
from t2i.files import written_whole

from ..optional import arrow_file, need
from ..shard_metadata import first_rows, identity, local_copy, scan

HASHES = ("phash", "dhash")
DECODED_PX = (
    128  # a large JPEG is decoded at a fraction of its size that still covers this: the hash needs 32 px
)
THUMBNAIL_PX = 8
THUMBNAIL_BYTES = THUMBNAIL_PX * THUMBNAIL_PX * 3
VERSION = "2"  # 2: colours of ICC profiles in sRGB


@dataclass(frozen=True)
class Hashes:
    """Of the n samples of one shard.

    keys: Arrow array of strings
    codes: (n,) uint64 perceptual hash; 0 for a picture that cannot be used
    digests: (n, 2) uint64, the first half of the SHA-256 of the picture's bytes
    thumbnails: (n, 8, 8, 3) uint8, means over areas
    pixels: (n,) int64 height x width of the original picture
    flaws: Arrow array of strings: why the picture cannot be used, null for a good one
    """

    keys: Any
    codes: np.ndarray
    digests: np.ndarray
    thumbnails: np.ndarray
    pixels: np.ndarray
    flaws: Any

    @classmethod
    def open(cls, path: Path) -> Hashes:
        """Maps a file that `hash_shard` wrote."""
        pa = need("pyarrow", "data")
        batch = pa.ipc.open_file(pa.memory_map(os.fsencode(path))).get_batch(0)
        fixed = [np.frombuffer(batch[name].buffers()[1], np.uint8) for name in ("digest", "thumbnail")]
        n = batch.num_rows
        return cls(
            batch["key"],
            batch["code"].to_numpy(),
            fixed[0][: n * 16].view(np.uint64).reshape(n, 2),
            fixed[1][: n * THUMBNAIL_BYTES].reshape(n, THUMBNAIL_PX, THUMBNAIL_PX, 3),
            batch["pixels"].to_numpy(),
            batch["flaw"],
        )


def hash_shard(url: str, keys: Sequence[str] | None, algorithm: str, folder: Path) -> Path:
    """The file with the hashes of shard `url`, computed unless `folder` has it.

    keys: the samples that count, in order; None: all of the shard
    algorithm: one of HASHES, as the package imagehash computes it, of 64 bits
    Raises DataError where the shard cannot be read.
    """
    pa = need("pyarrow", "data")
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}.arrow"
    wanted = "all" if keys is None else hashlib.sha256("\0".join(keys).encode()).hexdigest()
    made_of = {"version": VERSION, "hash": algorithm, "shard": identity(url), "keys": wanted}
    encoded = {name.encode(): value.encode() for name, value in made_of.items()}
    if path.exists():
        with arrow_file(path) as file:
            if pa.ipc.open_file(file).schema.metadata == encoded:
                return path
    batch = _hashed(url, keys, algorithm).replace_schema_metadata(encoded)
    with (
        written_whole(path) as unfinished,
        arrow_file(unfinished, "wb") as file,
        pa.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    return path


def _hashed(url: str, keys: Sequence[str] | None, algorithm: str) -> Any:
    pa = need("pyarrow", "data")
    perceptual = getattr(need("imagehash", "dedup"), algorithm)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("key", "code", "digest", "thumbnail", "pixels", "flaw")
    }
    with local_copy(url) as path:
        index = scan(path, url)
        places = first_rows(index)
        rows = enumerate(index.keys) if keys is None else ((places.get(key), key) for key in keys)
        with path.open("rb") as file:
            for row, key in rows:
                found: tuple[Any, ...] = (0, bytes(16), bytes(THUMBNAIL_BYTES), 0, None)
                try:
                    if row is None or row in index.flaws:
                        raise BadSample("missing" if row is None else index.flaws[row], key)
                    found = _features(index.read(file.fileno(), row), key, perceptual)
                except BadSample as error:
                    found = (*found[:-1], error.cause)
                except OSError:
                    found = (*found[:-1], "unreadable")
                for name, value in zip(columns, (key, *found), strict=True):
                    columns[name].append(value)
    types = (
        pa.string(),
        pa.uint64(),
        pa.binary(16),
        pa.binary(THUMBNAIL_BYTES),
        pa.int64(),
        pa.string(),
    )
    arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), types, strict=True)]
    return pa.record_batch(arrays, names=list(columns))


def _features(members: dict[str, bytes], key: str, perceptual: Any) -> tuple[Any, ...]:
    data = image_bytes(members, key)
    picture, stored = decode_image(data, key, (DECODED_PX, DECODED_PX))
    try:
        height, width = original_size(parse_metadata(members, key)) or stored
    except BadSample:  # the picture is good
        height, width = stored
    bits = np.packbits(perceptual(picture).hash)
    thumbnail = picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return (
        int.from_bytes(bits.tobytes(), "big"),
        hashlib.sha256(data).digest()[:16],
        np.asarray(thumbnail).tobytes(),
        height * width,
        None,
    )
