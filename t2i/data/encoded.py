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
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from t2i.data import sources
from t2i.data.decode import BadSample
from t2i.data.index import ShardIndex
from t2i.data.shards import index_beside
from t2i.data.sources import SourceError
from t2i.data.store import ShardStore
from t2i.errors import DataError
from t2i.interfaces import FeatureMakers, ImageCodec, TextEncoder, TextFeatures

RECORD = "encoded.json"
EMPTY_CAPTION = "empty_caption.safetensors"
VERSION = 1


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
            return cls(Preparation(size_px, how["bucket_step_px"], how["max_aspect"]), **values)
        except SourceError as error:
            raise DataError(
                f"data.encoded names {folder}, which `t2i data encode` has not made: {error}"
            ) from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
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
    path = PurePosixPath(
        url if not url.startswith("pipe:") else hashlib.sha256(url.encode()).hexdigest()[:16]
    )
    name = path.name if path.name.endswith(".tar") else path.name + ".tar"
    return f"{path.parent.name or 'shards'}/{name}"


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
        self._open: OrderedDict[str, tuple[ShardIndex, dict[str, int], IO[bytes]]] = OrderedDict()
        self._empty: tuple[Tensor, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def moments(self, shard_url: str, key: str, flipped: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """(M, h, w) as stored, and the tensors of the sample's captions. Raises BadSample."""
        tensors = self._read(shard_url, key)
        name = "moments_flip" if flipped else "moments"
        if name not in tensors:
            raise BadSample("missing", key, f"no {name} in {self.folder}/{shard_name(shard_url)}")
        return tensors[name], tensors

    def text(self, caption: str, tensors: dict[str, Tensor], key: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (L, D), pooled vector (P,) and mask (L,) of a caption, as stored. Raises BadSample."""
        name = caption_hash(caption)
        try:
            return tensors[f"{name}.tokens"], tensors[f"{name}.pooled"], tensors[f"{name}.mask"]
        except KeyError:
            raise BadSample("missing", key, f"its caption {caption[:40]!r} was not encoded") from None

    def empty_text(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of "". Raises DataError."""
        if self._empty is None:
            place = f"{self.folder}/{EMPTY_CAPTION}"
            tensors = safetensors.torch.load(sources.read_bytes(place, self.store.limits))
            self._empty = self.text("", tensors, place)
        return self._empty

    def _read(self, shard_url: str, key: str) -> dict[str, Tensor]:
        name = shard_name(shard_url)
        try:
            if name not in self._open:
                url = f"{self.folder}/{name}"
                path = self.store.path(url)
                file: IO[bytes] = path.open("rb", buffering=0)
                index = index_beside(url, self.store)
                if index is None or index.file_bytes != path.stat().st_size:
                    index = ShardIndex.scan(path)
                self._open[name] = index, {each: row for row, each in enumerate(index.keys)}, file
                while len(self._open) > self.KEEP_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(name)
            index, rows, file = self._open[name]
            if key not in rows:
                raise BadSample("missing", key, f"not in {self.folder}/{name}")
            members = index.read(file.fileno(), rows[key])
            return safetensors.torch.load(members["safetensors"])
        except (DataError, OSError, KeyError, SafetensorError) as error:
            raise BadSample("unreadable", key, f"{self.folder}/{name}: {error}") from error
