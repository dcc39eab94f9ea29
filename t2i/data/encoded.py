"""Features computed ahead of training by `t2i data encode`: what made them, and how they are read.

A folder holds `encoded.json` (the record), `empty_caption.safetensors`, and for each shard `a/b/00000.tar` of pictures
a shard `b/00000.tar` of `<key>.safetensors`: "size" (4,) int64, the height and width of the stored picture and the top
and left of the crop; "bytes" () int64, how many the picture's file has; each tensor of the picture by its name
("moments"), and of the mirrored picture ("moments_flip"); each tensor of a caption by the caption's hash and its name
("<hash>.tokens").
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from t2i.data import sources
from t2i.data.decode import BadSample
from t2i.data.opened import Opened, OpenShards, open_indexed
from t2i.data.sources import SourceError, within
from t2i.data.store import ShardStore
from t2i.errors import DataError
from t2i.interfaces import Feature, FeatureOf

RECORD = "encoded.json"
FLIP = "_flip"  # ends the names of a mirrored picture's tensors
EMPTY_CAPTION = "empty_caption.safetensors"
VERSION = (
    3  # 3: colours of ICC profiles in sRGB; 2: pictures resized with the bicubic filter; 1: with Lanczos
)


@dataclass(frozen=True)
class Preparation:
    """How a picture was brought to its size before it was encoded; has to be as training would do it."""

    size_px: tuple[int, int]
    bucket_step_px: int | None
    max_aspect: float


@dataclass(frozen=True)
class Made:
    """One feature of a folder.

    of: "image" or "caption"; tensors: their names; hash: of the weights that made it (see `feature_hash`)
    made_by: where these weights came from, for a person to read
    """

    of: FeatureOf
    tensors: tuple[str, ...]
    hash: str
    made_by: str = field(compare=False)

    def __post_init__(self) -> None:
        parts = (self.of, self.hash, self.made_by, *self.tensors)
        if self.of not in ("image", "caption") or not all(isinstance(part, str) for part in parts):
            raise ValueError("its features are not described as they should be")


@dataclass(frozen=True)
class Record:
    """What made the features of a folder.

    features: by name
    flip: whether mirrored pictures were encoded too; dtype: "float16" or "float32"
    """

    preparation: Preparation
    features: Mapping[str, Made]
    flip: bool
    dtype: str
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def read(cls, folder: str, limits: sources.Limits) -> Record:
        """Raises DataError where the folder has no record that this version understands."""
        place = f"{folder.rstrip('/')}/{RECORD}"
        try:
            values = json.loads(sources.read_bytes(place, limits))
            if values.get("version") != VERSION:
                raise ValueError(f"its version is {values.get('version')}, allowed: {VERSION}")
            how = values.pop("preparation")
            size_px = (int(how["size_px"][0]), int(how["size_px"][1]))
            features = {
                name: Made(made["of"], tuple(made["tensors"]), made["hash"], made["made_by"])
                for name, made in _features_of(values).items()
            }
            prepared = Preparation(size_px, how["bucket_step_px"], how["max_aspect"])
            record = cls(prepared, features, values["flip"], values["dtype"])
            if not isinstance(prepared.bucket_step_px, int | None) or not isinstance(
                prepared.max_aspect, int | float
            ):
                raise ValueError("its preparation is not in numbers")
            if not isinstance(record.flip, bool):
                raise ValueError("its flip is neither true nor false")
            return record
        except SourceError as error:
            raise DataError(
                f"data.encoded names {folder}, which `t2i data encode` has not made: {error}"
            ) from error
        except (
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise DataError(f"{place} is not a record of `t2i data encode`: {error}.") from error


def _features_of(values: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The features of a record; the two that there were had keys of their own once."""
    if "autoencoder" not in values:
        return values["features"]
    old = [("latents", "image", ["moments"], "autoencoder", "autoencoder")]
    if values["text"] is not None:
        old.append(("text", "caption", ["tokens", "pooled", "mask"], "text", "text encoder"))
    return {
        name: {"of": of, "tensors": tensors, "hash": values[key], "made_by": values["made_by"][maker]}
        for name, of, tensors, key, maker in old
    }


def weights_hash(parts: Iterable[tuple[str, Tensor]], *settings: object) -> str:
    """SHA-256 of named tensors (by sorted name, shape, type and bytes) and of whatever else decides a result."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(parts, key=lambda part: part[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def feature_hash(feature: Feature) -> str:
    """Of what decides the feature."""
    return weights_hash(feature.weights().items(), *feature.settings)


def check_same(folder: str, record: Record, features: Mapping[str, Feature]) -> None:
    """Raises DataError unless a stage with these `features` would make those in `folder`, and can train on them."""
    for name, made in record.features.items():
        own = feature_hash(features[name]) if name in features else None
        if made.hash != own:
            ours = "by weights that learn" if own is None else f"by weights with hash {own[:12]}"
            raise DataError(
                f"data.encoded={folder} holds {name} made by {made.made_by} (hash {made.hash[:12]}), this run "
                f"makes them {ours}: encode again, or take {made.made_by}."
            )
    if lacking := lacking_of_pictures(record.features, features):
        raise DataError(
            f"data.encoded={folder} holds what is made of pictures without {' and '.join(lacking)}, and pictures are "
            "not read beside it; encode all that this run makes of them."
        )


def lacking_of_pictures(kept: Collection[str], features: Mapping[str, Feature]) -> list[str]:
    """Those that a stage makes of pictures and that are not kept, where some of them are."""
    of_pictures = [name for name, feature in features.items() if feature.of == "image"]
    lacking = [name for name in of_pictures if name not in kept]
    return lacking if len(lacking) < len(of_pictures) else []


def shard_name(url: str) -> str:
    """Of a shard of pictures: the name of its encoded shard within the folder, "<its folder>/<its name>"."""
    address = sources.split_query(url)[0]
    if url.startswith("pipe:"):
        address = hashlib.sha256(url.encode()).hexdigest()[:16]
    elif sources.is_local(url) and ".." in PurePosixPath(url).parts:  # which would lead out of the folder
        address = os.path.abspath(sources.local_path(url))
    path = PurePosixPath(posixpath.normpath(address))
    name = sources.without_ending(path.name) + ".tar"
    parent = path.parent.name
    return f"{'shards' if parent in ('', '..') else parent}/{name}"


def caption_hash(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EncodedSample:
    """original_size: height and width of the stored picture; crop: top and left after resizing
    image: the picture's tensors by name, as stored
    captions: those of each caption; {} where none were encoded
    """

    original_size: tuple[int, int]
    crop: tuple[int, int]
    image: dict[str, Tensor]
    captions: dict[str, dict[str, Tensor]]


class EncodedShards:
    """Reads the features of samples; the record says what made them."""

    KEEP_OPEN = 64

    def __init__(self, folder: str, store: ShardStore, flip: bool) -> None:
        self.folder, self.store = folder.rstrip("/"), store
        self.record = Record.read(folder, store.limits)
        # A picture that has features is not read.
        self.of_pictures, self.of_captions = (
            [name for made in self.record.features.values() if made.of == kind for name in made.tensors]
            for kind in ("image", "caption")
        )
        if flip and self.of_pictures and not self.record.flip:
            raise DataError(
                f"data.encoded={folder} holds no mirrored pictures; allowed: data.horizontal_flip=false, or encode "
                "with data.horizontal_flip=true."
            )
        self._open = OpenShards[str](self.KEEP_OPEN)
        self._layout: dict[str, tuple[object, ...] | None] = {}  # of the tensors of pictures
        # The tensors of "", whose shapes all captions' have.
        self.empty_caption: dict[str, Tensor] = {}
        if self.of_captions:
            self.empty_caption = self._read_empty()

    def sample(
        self,
        shard_url: str,
        key: str,
        captions: Iterable[str],
        shape: tuple[int, int],
        flipped: bool,
        picture_bytes: int | None = None,
    ) -> EncodedSample:
        """Of a picture of `shape` (H, W). Raises BadSample.
        picture_bytes: of its file; None where the shard no longer has it"""
        tensors = self._read(shard_url, key)
        names = {name: name + FLIP * flipped for name in self.of_pictures}
        where = f"{self.folder}/{shard_name(shard_url)}"
        if not {"size", *names.values()} <= tensors.keys():
            raise BadSample("missing", key, f"no {' and '.join([*names.values(), 'size'])} in {where}")
        if self.of_pictures and picture_bytes is not None:
            made_of = tensors.get("bytes", torch.tensor(picture_bytes))  # older folders do not say it
            if made_of.numel() != 1 or made_of.item() != picture_bytes:
                said = f"{where} holds features of another picture, remove it and encode again"
                raise BadSample("damaged", key, said)
        size, image = tensors["size"], {name: tensors[stored] for name, stored in names.items()}
        layout = {name: layout_of(tensor, shape) for name, tensor in image.items()}
        ok = size.shape == (4,) and not size.is_floating_point() and None not in layout.values()
        if not ok or layout != (self._layout or layout) or not all(map(_finite, image.values())):
            shapes = ", ".join(f"{name} of {tuple(tensor.shape)}" for name, tensor in image.items())
            raise BadSample("damaged", key, f"{shapes or 'size'} for {shape} pixels in {where}")
        self._layout = layout
        of_captions = {
            caption: self._caption(caption, tensors, key) for caption in captions if self.of_captions
        }
        height, width, top, left = size.tolist()
        return EncodedSample((height, width), (top, left), image, of_captions)

    def _caption(self, caption: str, tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
        """The tensors of a caption, as stored. Raises BadSample."""
        stored = caption_hash(caption)
        try:
            found = {name: tensors[f"{stored}.{name}"] for name in self.of_captions}
        except KeyError:
            raise BadSample("missing", key, f"its caption {caption[:40]!r} was not encoded") from None
        if any(found[name].shape != tensor.shape for name, tensor in self.empty_caption.items()):
            raise BadSample("damaged", key, f"features of another shape for its caption {caption[:40]!r}")
        if not all(map(_finite, found.values())):
            raise BadSample("damaged", key, f"features that are not finite for its caption {caption[:40]!r}")
        return found

    def _read_empty(self) -> dict[str, Tensor]:
        place = f"{self.folder}/{EMPTY_CAPTION}"
        try:
            return self._caption("", _load(sources.read_bytes(place, self.store.limits), place), place)
        except BadSample as error:
            raise DataError(
                f"{place} is not what `t2i data encode` writes: {error}; encode again."
            ) from error

    def _read(self, shard_url: str, key: str) -> dict[str, Tensor]:
        name = shard_name(shard_url)
        opened = self._open.get(name) or self._open.open(name, lambda: name, lambda: self._open_now(name))
        if opened.failure is not None:
            raise BadSample(opened.failure.cause, key, str(opened.failure))
        assert isinstance(opened, OpenedByKey)
        assert opened.file is not None
        row, descriptor = opened.row_of.get(key), opened.file.fileno()
        where = f"{self.folder}/{name}"
        if row is None:
            raise BadSample("missing", key, f"not in {where}")
        if flaw := opened.index.flaws.get(row):
            raise BadSample(flaw, key, where)
        try:
            members = within(
                self.store.limits.deadline_s, lambda: opened.index.read(descriptor, row, ("safetensors",))
            )
        except TimeoutError as error:
            self._open.fail(name, name, "unreadable", f"{where}: {error}")
            raise BadSample("unreadable", key, f"{where}: {error}") from error
        except OSError as error:
            raise BadSample("unreadable", key, f"{where}: {error}") from error
        return _load(members.get("safetensors", b""), key)

    def _open_now(self, name: str) -> OpenedByKey:
        found = open_indexed(f"{self.folder}/{name}", self.store)
        row_of = {key: row for row, key in enumerate(found.index.keys)}
        return OpenedByKey(found.index, np.arange(len(found.index)), found.file, row_of=row_of)


@dataclass
class OpenedByKey(Opened):
    """row_of: the row of each key"""

    row_of: dict[str, int] = field(default_factory=dict)


def _load(data: bytes, key: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise BadSample("damaged", key, f"not safetensors: {error}") from error


def layout_of(tensor: Tensor, shape: tuple[int, int]) -> tuple[object, ...] | None:
    """What all pictures' tensors of one name have in common: of a vector its length; of a map (..., h, w) what comes
    before h and w, and the pixels that a position stands for along each side. None for what does not fit a picture of
    `shape` (H, W)."""
    if tensor.ndim == 1 and tensor.numel():
        return tuple(tensor.shape)
    if tensor.ndim < 2 or not tensor.numel():
        return None
    *before, height, width = tensor.shape
    factor = shape[0] // height
    return (*before, "x", factor) if (factor * height, factor * width) == shape else None


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float()).all())
