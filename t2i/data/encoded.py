"""Latents and text features computed ahead of training by `t2i data encode`: what made them, and how they are read.

A folder holds `encoded.json` (the record), `empty_caption.safetensors`, and for each shard `a/b/00000.tar` of pictures
a shard `b/00000.tar` of `<key>.safetensors`: "moments" (M, h, w), "moments_flip" of the mirrored picture, "size" (4,)
int64, the height and width of the stored picture and the top and left of the crop, and for each caption, named by its
hash, "<hash>.tokens" (L, D), "<hash>.pooled" (P,), "<hash>.mask" (L,).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from t2i.data import sources
from t2i.data.decode import BadSample
from t2i.data.opened import Opened, OpenShards, open_indexed
from t2i.data.sources import SourceError, within
from t2i.data.store import ShardStore
from t2i.errors import DataError
from t2i.interfaces import FeatureMakers, ImageCodec, TextEncoder, TextFeatures

RECORD = "encoded.json"
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
class Record:
    """What made the features of a folder.

    autoencoder, text: hashes of the weights that decide the features (see `weights_hash`); text None: no text features
    made_by: where these weights came from, for a person to read
    flip: whether mirrored pictures were encoded too; dtype: "float16" or "float32"
    """

    preparation: Preparation
    autoencoder: str
    text: str | None
    made_by: dict[str, str]
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
            record = cls(Preparation(size_px, how["bucket_step_px"], how["max_aspect"]), **values)
            if not isinstance(record.autoencoder, str) or not isinstance(record.text, str | None):
                raise ValueError("its hashes are not text")
            prepared = record.preparation
            if not isinstance(prepared.bucket_step_px, int | None) or not isinstance(
                prepared.max_aspect, int | float
            ):
                raise ValueError("its preparation is not in numbers")
            if not isinstance(record.made_by, dict) or not isinstance(record.flip, bool):
                raise ValueError("its made_by or flip is of another kind")
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


def weights_hash(parts: Iterable[tuple[str, Tensor]], *settings: object) -> str:
    """SHA-256 of named tensors (by sorted name, shape, type and bytes) and of whatever else decides a result."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(parts, key=lambda part: part[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def codec_hash(codec: ImageCodec) -> str:
    """Of what decides the moments of a picture: the decoder may differ."""
    return weights_hash(codec.encoding_weights().items(), type(codec).__name__)


def text_hash(encoder: TextEncoder) -> str:
    """Of what decides the features of a caption. encoder: an `nn.Module`"""
    assert isinstance(encoder, nn.Module)
    return weights_hash(encoder.state_dict().items(), type(encoder).__name__, encoder.max_tokens)


def check_same(folder: str, record: Record, makers: FeatureMakers) -> None:
    """Raises DataError unless `makers` would make the features in `folder`."""
    checks = [("autoencoder", record.autoencoder, codec_hash(makers.codec))]
    if record.text is not None:
        checks.append(("text encoder", record.text, "" if makers.text is None else text_hash(makers.text)))
    for what, recorded, own in checks:
        if recorded != own:
            ours = f"uses one with hash {own[:12]}" if own else "trains its own"
            raise DataError(
                f"data.encoded={folder} was made by the {what} {record.made_by.get(what, '?')} (hash "
                f"{recorded[:12]}), and this run {ours}: encode again, or take that {what}."
            )


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


def pack_text(captions: Sequence[str], features: TextFeatures, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of some captions by name."""
    packed = {}
    for i, caption in enumerate(captions):
        name = caption_hash(caption)
        packed[f"{name}.tokens"] = features.tokens[i].to("cpu", dtype)
        packed[f"{name}.pooled"] = features.pooled[i].to("cpu", dtype)
        packed[f"{name}.mask"] = features.mask[i].to("cpu", torch.uint8)
    return packed


class EncodedShards:
    """Reads the features of samples; the record says what made them."""

    KEEP_OPEN = 64

    def __init__(self, folder: str, store: ShardStore, flip: bool) -> None:
        self.folder, self.store = folder.rstrip("/"), store
        self.record = Record.read(folder, store.limits)
        if flip and not self.record.flip:
            raise DataError(
                f"data.encoded={folder} holds no mirrored pictures; allowed: data.horizontal_flip=false, or encode "
                "with data.horizontal_flip=true."
            )
        self._open = OpenShards[str](self.KEEP_OPEN)
        self._moments: tuple[int, int] | None = (
            None  # how many, and the pixels that each stands for along a side
        )
        self._empty: tuple[Tensor, Tensor, Tensor] | None = None
        if self.record.text is not None:
            self._empty = self._read_empty()

    def moments(
        self, shard_url: str, key: str, shape: tuple[int, int], flipped: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(M, h, w) as stored, of a picture of `shape` (H, W), and all the tensors of the sample; of them "size" is
        (4,). Raises BadSample."""
        tensors = self._read(shard_url, key)
        name = "moments_flip" if flipped else "moments"
        where = f"{self.folder}/{shard_name(shard_url)}"
        if name not in tensors or "size" not in tensors:
            raise BadSample("missing", key, f"no {name} and size in {where}")
        moments, size = tensors[name], tensors["size"]
        if moments.ndim != 3 or not moments.numel() or size.shape != (4,) or size.is_floating_point():
            raise BadSample("damaged", key, f"moments of {tuple(moments.shape)} in {where}")
        factor = shape[0] // moments.shape[1]
        layout = len(moments), factor
        whole = (factor * moments.shape[1], factor * moments.shape[2]) == shape
        if not whole or layout != (self._moments or layout) or not _finite(moments):
            raise BadSample(
                "damaged", key, f"moments of {tuple(moments.shape)} for {shape} pixels in {where}"
            )
        self._moments = layout
        return moments, tensors

    def text(self, caption: str, tensors: dict[str, Tensor], key: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (L, D), pooled vector (P,) and mask (L,) of a caption, as stored. Raises BadSample."""
        name = caption_hash(caption)
        try:
            found = tensors[f"{name}.tokens"], tensors[f"{name}.pooled"], tensors[f"{name}.mask"]
        except KeyError:
            raise BadSample("missing", key, f"its caption {caption[:40]!r} was not encoded") from None
        if self._empty is not None and [x.shape for x in found] != [x.shape for x in self._empty]:
            raise BadSample("damaged", key, f"features of another shape for its caption {caption[:40]!r}")
        if not all(map(_finite, found)):
            raise BadSample("damaged", key, f"features that are not finite for its caption {caption[:40]!r}")
        return found

    def empty_text(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of "", where text was encoded."""
        assert self._empty is not None
        return self._empty

    def _read_empty(self) -> tuple[Tensor, Tensor, Tensor]:
        place = f"{self.folder}/{EMPTY_CAPTION}"
        try:
            return self.text("", _load(sources.read_bytes(place, self.store.limits), place), place)
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

    row_of: dict[str, int] = dataclasses.field(default_factory=dict)


def _load(data: bytes, key: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise BadSample("damaged", key, f"not safetensors: {error}") from error


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float()).all())
