"""A small text encoder that is trained with the model it conditions.

Captions of small datasets use a few hundred words in new combinations. So a token is a whole word, and the
transformer is left with composing words, which it learns in minutes, instead of spelling, which it would not.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.interfaces import TextFeatures
from t2i.nn.attention import Attention

WORD = re.compile(r"\w+|[^\w\s]")
WORD_ROWS = 8192
TRIGRAM_ROWS = 8192


@lru_cache(maxsize=2**16)
def word_rows(word: str) -> tuple[int, tuple[int, ...]]:
    """The word's row of the word table and its byte trigrams' rows of the trigram table, by CRC-32: the same
    in every process, unlike Python's `hash`. "<" and ">" mark the ends of the word."""
    spelt = f"<{word}>".encode()
    trigrams = (spelt[i : i + 3] for i in range(len(spelt) - 2))
    return zlib.crc32(spelt) % WORD_ROWS, tuple(zlib.crc32(trigram) % TRIGRAM_ROWS for trigram in trigrams)


class WordEmbedding(nn.Module):
    """A word's own vector plus the mean of its byte trigrams' vectors (fastText, arXiv:1607.04606), both from
    hashed tables of fixed size: there is no vocabulary to prepare, and no unknown word.

    A word's own vector starts at zero, so that a word never trained on, or misspelt, is what its trigrams say.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.word = nn.Embedding(WORD_ROWS, dim)
        self.trigram = nn.EmbeddingBag(TRIGRAM_ROWS, dim, mode="mean")
        nn.init.zeros_(self.word.weight)
        nn.init.normal_(self.trigram.weight)

    def forward(self, words: Sequence[str]) -> Tensor:
        """N words -> (N, dim)."""
        device = self.word.weight.device
        rows = [word_rows(word) for word in words]
        trigrams = [row for _, group in rows for row in group]
        offsets = torch.tensor([0] + [len(group) for _, group in rows]).cumsum(0)[:-1]
        spelling = self.trigram(
            torch.tensor(trigrams, dtype=torch.long, device=device), offsets.to(device, non_blocking=True)
        )
        return self.word(torch.tensor([row for row, _ in rows], dtype=torch.long, device=device)) + spelling


class TextBlock(nn.Module):
    """A pre-norm transformer block (Xiong et al., arXiv:2002.04745) whose attention sees both directions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads=heads, head_dim=dim // heads)
        self.norm_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, L, dim); mask: (B, L) bool, True where a token is -> (B, L, dim)."""
        x = x + self.attention(self.norm_1(x), mask=mask)
        return x + self.mlp(self.norm_2(x))


class LearnedTextEncoder(nn.Module):
    """Lower-cased words -> a start token and one token per word, through `depth` blocks.

    tokens: (B, max_tokens, width), zero where the caption has ended; pooled: (B, width), their mean over the
    caption. The start token is all there is of an empty caption.
    """

    trainable = True

    def __init__(self, max_tokens: int = 32, width: int = 128, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.token_dim = self.pooled_dim = width
        self.embedding = WordEmbedding(width)
        self.start = nn.Parameter(torch.randn(width))
        self.position = nn.Parameter(torch.randn(max_tokens, width) * 0.02)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def split(self, caption: str) -> list[str]:
        """The words that fit after the start token; punctuation marks are words."""
        return WORD.findall(caption.lower())[: self.max_tokens - 1]

    def forward(self, captions: Sequence[str]) -> TextFeatures:
        words = [self.split(caption) for caption in captions]
        lengths = torch.tensor([1 + len(split) for split in words], device=self.start.device)
        mask = torch.arange(self.max_tokens, device=self.start.device) < lengths[:, None]
        x = self._embed(words, mask) + self.position
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x) * mask[..., None]
        return TextFeatures(x, x.sum(1) / lengths[:, None], mask)

    def _embed(self, words: list[list[str]], mask: Tensor) -> Tensor:
        is_word = F.pad(mask[:, 1:], (1, 0))  # all but the start token
        x = torch.zeros(*mask.shape, self.token_dim, device=mask.device, dtype=self.start.dtype)
        x[:, 0] = self.start
        flat = [word for split in words for word in split]
        if flat:
            x[is_word] = self.embedding(flat)
        return x
