"""What frozen text encoders share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from t2i.errors import ConfigError
from t2i.interfaces import TextFeatures
from t2i.weight_file import check_finite


class FrozenTextEncoder(nn.Module):
    """Base of encoders that are never trained: always in eval mode, without gradients. Subclasses write
    `encode` and call `freeze` when they are built."""

    trainable = False

    def __init__(self, token_dim: int, pooled_dim: int, max_tokens: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.pooled_dim = pooled_dim
        self.max_tokens = max_tokens

    def freeze(self) -> None:
        """Raises CheckpointError where the weights that were read are not finite."""
        self.requires_grad_(False).train(False)
        check_finite(dict(self.named_parameters()), "the text encoder")

    def train(self, mode: bool = True) -> FrozenTextEncoder:
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> TextFeatures:
        """B captions, "" allowed -> features of max_tokens tokens each, float32."""
        return self.encode(list(captions))

    def encode(self, captions: list[str]) -> TextFeatures:
        raise NotImplementedError


def check_max_tokens(max_tokens: int, limit: int, what: str) -> None:
    """Raises ConfigError where an encoder has no positions for so many tokens."""
    if max_tokens > limit:
        raise ConfigError(f"text.max_tokens is {max_tokens}; allowed: at most {limit}, as {what} has.")


def added_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L) whole numbers, 1 where a token may be attended to -> (B, 1, 1, L), added to the logits of attention.
    transformers asks a mask of two axes whether all may be, for which the host would wait."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)[:, None, None]


def mask_up_to_end(ids: Tensor, end: int) -> Tensor:
    """(B, L) token ids -> (B, L) bool, True up to and including the first `end` of each row. Padding of CLIP
    tokenizers cannot be told from text by its id: it is either `end` itself or 0, which means "!"."""
    return (ids == end).int().cumsum(1) - (ids == end).int() == 0
