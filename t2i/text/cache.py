"""Features of captions, kept."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from t2i.interfaces import TextEncoder, TextFeatures

MAX_BYTES = 2 * 2**30  # of the host's memory, in each process
SLAB_BYTES = 64 * 2**20  # taken at a time
MIN_HITS = 0.1  # of the captions asked for; below that it costs more than it gives
MIN_MEASURED = 1000


class CachedTextEncoder:
    """A frozen encoder that encodes each distinct caption once, as far as `max_bytes` allow.

    A plain object and no `nn.Module`: assigned to a stage, it is not among the stage's modules, so that the
    encoder's weights enter neither its checkpoint, nor its optimizer, nor DDP's buckets. For the same reason
    `stage.to(device)` does not reach it: the stage calls `.to(device)` of its own.

    encoder: frozen (`trainable` false), an `nn.Module`
    max_bytes: of the host's memory (page-locked where the encoder is on a GPU), the captions least recently used
        leaving first; one takes L * D + P numbers (50 kB for 32 tokens of MiniLM, 240 kB for 77 of CLIP ViT-L, 2 MB for
        120 of T5-XXL). Where they are full and hardly a caption comes again, nothing is kept any more.
    Only the captions of a batch that are not kept are encoded, together. Features equal those of the encoder
    as far as its own results do not depend on what else is in a batch: bit for bit where the matrix products
    round alike at every batch size, as they do on the CPUs tried.
    """

    trainable = False

    def __init__(self, encoder: TextEncoder, max_bytes: int = MAX_BYTES) -> None:
        if encoder.trainable:
            raise ValueError("features of an encoder that is still learning cannot be kept")
        self.encoder = encoder
        self.max_bytes = max_bytes
        self.token_dim = encoder.token_dim
        self.pooled_dim = encoder.pooled_dim
        self.max_tokens = encoder.max_tokens
        self.encoding_s = 0.0  # that the host was busy with the encoder so far; a GPU's own work is not in it
        self._kept: _HostRows | None = None  # made with the first features, of their shape
        self._off = False
        self._asked = self._found = 0  # since it is full

    def __len__(self) -> int:
        """Captions kept."""
        return 0 if self._kept is None else len(self._kept.slots)

    def keeps(self, count: int) -> bool:
        """Whether so many captions would be kept, as far as is known by now."""
        return self._kept is not None and count <= self._kept.capacity

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """B captions -> features; the result is the caller's own copy."""
        distinct = list(dict.fromkeys(captions))
        slots = {} if self._kept is None else self._kept.slots
        missing = [caption for caption in distinct if caption not in slots]
        found = [caption for caption in distinct if caption in slots]
        rows: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        if found:
            assert self._kept is not None
            rows = dict(zip(found, _rows(self._kept.get(found)), strict=True))
        if missing:
            began = time.perf_counter()
            encoded = self.encoder(missing)
            self.encoding_s += time.perf_counter() - began
            rows |= dict(zip(missing, _rows(encoded), strict=True))
            self._keep(missing, encoded)
        self._measure(len(distinct), len(found))
        return TextFeatures(
            *(torch.stack(column) for column in zip(*(rows[caption] for caption in captions), strict=True))
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> CachedTextEncoder:
        """Moves the encoder, its floating tensors as `dtype`. What was computed elsewhere, or otherwise, is not what it
        computes now, and is forgotten."""
        if isinstance(self.encoder, nn.Module):
            self.encoder.to(device=device, dtype=dtype)
        self._kept = None
        return self

    def _keep(self, captions: Sequence[str], features: TextFeatures) -> None:
        if self._off:
            return
        if self._kept is None or not self._kept.takes(features):
            self._kept = _HostRows(features, self.max_bytes)
        self._kept.put(captions, features)

    def _measure(self, asked: int, found: int) -> None:
        if self._kept is None or not self._kept.full:
            return
        self._asked, self._found = self._asked + asked, self._found + found
        if self._asked >= max(MIN_MEASURED, self._kept.capacity):
            if self._found < MIN_HITS * self._asked:
                self._kept, self._off = None, True
            self._asked = self._found = 0


class _HostRows:
    """Features of captions in the host's memory, all of one shape. Copies from and to a GPU are asked for and not
    waited for: they happen in the order of its stream.

    like: (B, L, D), (B, P) and (B, L), of which each row has the shape
    slots: of each caption, the least recently used first
    """

    def __init__(self, like: TextFeatures, max_bytes: int) -> None:
        self._like = [tensor.new_empty(tensor.shape[1:]) for tensor in _columns(like)]
        row_bytes = sum(tensor.nbytes for tensor in self._like)
        self._per_slab = max(1, min(max_bytes, SLAB_BYTES) // row_bytes)
        self.capacity = max_bytes // row_bytes // self._per_slab * self._per_slab
        self._slabs: list[list[Tensor]] = []
        self.slots: OrderedDict[str, int] = OrderedDict()

    @property
    def full(self) -> bool:
        return len(self.slots) == self.capacity

    def takes(self, features: TextFeatures) -> bool:
        """Whether they have the shape, type and device of what is here."""
        return all(
            tensor.shape[1:] == like.shape and tensor.dtype == like.dtype and tensor.device == like.device
            for tensor, like in zip(_columns(features), self._like, strict=True)
        )

    def put(self, captions: Sequence[str], features: TextFeatures) -> None:
        """Keeps features of captions that are not here, the last ones where they are too many."""
        first = max(0, len(captions) - self.capacity)
        for i in range(first, len(captions)):
            slot = self.slots.popitem(last=False)[1] if self.full else len(self.slots)
            if slot // self._per_slab == len(self._slabs):
                self._slabs.append(self._slab())
            for kept, column in zip(self._row(slot), _columns(features), strict=True):
                kept.copy_(column[i], non_blocking=True)
            self.slots[captions[i]] = slot

    def get(self, captions: Sequence[str]) -> TextFeatures:
        """A copy, on the device that they came from."""
        found = [like.new_empty(len(captions), *like.shape) for like in self._like]
        for i, caption in enumerate(captions):
            self.slots.move_to_end(caption)
            for column, kept in zip(found, self._row(self.slots[caption]), strict=True):
                column[i].copy_(kept, non_blocking=True)
        return TextFeatures(*found)

    def _row(self, slot: int) -> list[Tensor]:
        slab, row = divmod(slot, self._per_slab)
        return [column[row] for column in self._slabs[slab]]

    def _slab(self) -> list[Tensor]:
        return [
            torch.empty(self._per_slab, *like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            for like in self._like
        ]


def _columns(features: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
    return features.tokens, features.pooled, features.mask


def _rows(features: TextFeatures) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Views of each caption's."""
    return list(zip(*(column.unbind() for column in _columns(features)), strict=True))
