"""Features of captions, kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from t2i.interfaces import TextEncoder, TextFeatures


class CachedTextEncoder:
    """A frozen encoder that encodes each distinct caption once.

    A plain object and no `nn.Module`: assigned to a stage, it is not among the stage's modules, so that the
    encoder's weights enter neither its checkpoint, nor its optimizer, nor DDP's buckets. For the same reason
    `stage.to(device)` does not reach it: the stage calls `.to(device)` of its own.

    encoder: frozen (`trainable` false), an `nn.Module`
    max_entries: captions kept, the least recently used leaving first; one takes L * D + P floats on the
        encoder's device (50 kB for 32 tokens of MiniLM, 240 kB for 77 of CLIP ViT-L)
    Only the captions of a batch that are not kept are encoded, together. Features equal those of the encoder
    as far as its own results do not depend on what else is in a batch: bit for bit where the matrix products
    round alike at every batch size, as they do on the CPUs tried.
    """

    trainable = False

    def __init__(self, encoder: TextEncoder, max_entries: int) -> None:
        if encoder.trainable:
            raise ValueError("features of an encoder that is still learning cannot be kept")
        self.encoder = encoder
        self.max_entries = max_entries
        self.token_dim = encoder.token_dim
        self.pooled_dim = encoder.pooled_dim
        self.max_tokens = encoder.max_tokens
        self._kept: OrderedDict[str, TextFeatures] = OrderedDict()

    def __len__(self) -> int:
        """Captions kept."""
        return len(self._kept)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> TextFeatures:
        """B captions -> features; the result is the caller's own copy."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        if missing:
            encoded = self.encoder(missing)
            for i, caption in enumerate(missing):  # cloned: a row alone would keep its whole batch alive
                row = encoded.tokens[i].clone(), encoded.pooled[i].clone(), encoded.mask[i].clone()
                self._kept[caption] = TextFeatures(*row)
        rows = [self._kept[caption] for caption in captions]
        for caption in captions:
            self._kept.move_to_end(caption)
        while len(self._kept) > self.max_entries:
            self._kept.popitem(last=False)
        return TextFeatures(
            tokens=torch.stack([row.tokens for row in rows]),
            pooled=torch.stack([row.pooled for row in rows]),
            mask=torch.stack([row.mask for row in rows]),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> CachedTextEncoder:
        """Moves the encoder and what is kept; their floating tensors become `dtype`."""
        if isinstance(self.encoder, nn.Module):
            self.encoder.to(device=device, dtype=dtype)
        for caption, features in self._kept.items():
            self._kept[caption] = features.to(device, dtype)
        return self
