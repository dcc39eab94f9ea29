"""A small text encoder that is trained with the model it conditions.

Captions of small datasets use a few hundred words in new combinations. So a token is a whole word, and the
transformer is left with composing words, which it learns in minutes, instead of spelling, which it would not.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from t2i.interfaces import TextFeatures
from t2i.nn.attention import Attention
from t2i.nn.transfer import placed

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


def words_of(caption: str) -> list[str]:
    """Lower-cased; punctuation marks are words."""
    return WORD.findall(caption.lower())


class WordEmbedding(nn.Module):
    """A word's own vector plus the mean of its byte trigrams' vectors (fastText, arXiv:1607.04606), both from
    hashed tables of fixed size: there is no vocabulary to prepare, and no unknown word.

    A word's own vector starts at zero: a word never trained on, or misspelt, is what its trigrams say.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.word = nn.Embedding(WORD_ROWS, dim)
        self.trigram = nn.EmbeddingBag(TRIGRAM_ROWS, dim, mode="mean")
        nn.init.zeros_(self.word.weight)
        nn.init.normal_(self.trigram.weight)

    def forward(self, words: Sequence[str]) -> Tensor:
        """N words, perhaps none -> (N, dim)."""
        rows = [word_rows(word) for word in words]
        own = self._index(row for row, _ in rows)
        trigrams = self._index(row for _, group in rows for row in group)
        starts = self._index(accumulate((len(group) for _, group in rows), initial=0))[:-1]
        return self.word(own) + self.trigram(trigrams, starts)

    def _index(self, numbers: Iterable[int]) -> Tensor:
        return placed(torch.tensor(list(numbers), dtype=torch.long), self.word.weight.device)


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

    Words that belong together mostly stand together, so each token first sees its two neighbours through a
    convolution, and positions start out as large as words. With small positions (0.02) and no convolution,
    which colour goes with which shape was not learned in 300 steps; with both, in 75.

    tokens: (B, max_tokens, width), zero where the caption has ended; pooled: (B, width), their mean over the
    caption. The start token is all there is of an empty caption.
    """

    trainable = True

    def __init__(self, max_tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.token_dim = self.pooled_dim = width
        self.embedding = WordEmbedding(width)
        self.start = nn.Parameter(torch.randn(width))
        self.position = nn.Parameter(torch.randn(max_tokens, width) / 2)
        self.neighbours = nn.Conv1d(width, width, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def split(self, caption: str) -> list[str]:
        """The words that fit after the start token."""
        return words_of(caption)[: self.max_tokens - 1]

    def forward(self, captions: Sequence[str]) -> TextFeatures:
        words = [self.split(caption) for caption in captions]
        device = self.start.device
        lengths = torch.tensor([1 + len(split) for split in words])
        mask = torch.arange(self.max_tokens) < lengths[:, None]
        # Where the words go is worked out on the host, so that it never waits for the device.
        is_word = mask.clone()
        is_word[:, 0] = False
        places = placed(is_word.flatten().nonzero()[:, 0], device)
        x = self.start.repeat(mask.numel(), 1)
        x = x.index_copy(0, places, self.embedding([word for split in words for word in split]))
        mask, lengths = placed(mask, device), placed(lengths, device)
        x = self.transform(x.unflatten(0, mask.shape) + self.position, mask)
        return TextFeatures(x, x.sum(1) / lengths[:, None], mask)

    def transform(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, L, width) embedded words at their positions; mask: (B, L) bool -> (B, L, width)."""
        x = x * mask[..., None]
        x = x + self.neighbours(x.mT).mT
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x) * mask[..., None]
