"""Text as tokens of a vocabulary in one stream with the picture's (DALL-E, 2102.12092, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.config import check
from t2i.interfaces import TextFeatures
from t2i.nn.precision import widened
from t2i.nn.transfer import placed
from t2i.text.minilm import read_tokenizer

TEXT_WEIGHT = 1 / 8  # of the text's part in the loss; the rest is the codes'


class WordNumbers(nn.Module):
    """A `t2i.interfaces.TextEncoder` that says which tokens of BERT's vocabulary a caption has. There is nothing in it
    to learn or to compute ahead.

    tokens: (B, max_tokens, 1) float32, their numbers; pooled: (B, 1), nothing
    """

    trainable = True
    token_dim = pooled_dim = 1
    where: Tensor

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens, self.tokenizer = max_tokens, read_tokenizer()
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.enable_padding(length=max_tokens)
        self.register_buffer("where", torch.empty(0), persistent=False)

    @property
    def num_words(self) -> int:
        return self.tokenizer.get_vocab_size()

    def forward(self, captions: Sequence[str]) -> TextFeatures:
        device = self.where.device
        encodings = self.tokenizer.encode_batch(list(captions))
        numbers = placed(torch.tensor([encoding.ids for encoding in encodings]), device)
        mask = placed(torch.tensor([encoding.attention_mask for encoding in encodings]), device)
        tokens = numbers[:, :, None].float()
        return TextFeatures(tokens, tokens.new_zeros(len(tokens), 1), mask.bool())


class WordPrefix(nn.Module):
    """Words as the first slots, each with its position; past the end of a caption a vector of the slot's own.

    vocabulary: rows of the table
    """

    def __init__(self, vocabulary: int, max_tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        self.padding = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens: (B, L, 1), the words' numbers; mask: (B, L) bool, True where there is one -> (B, L, width)."""
        words = self.embedding(tokens[:, :, 0].long()) + self.position
        return torch.where(mask[:, :, None], words, self.padding)

    def loss(self, states: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """states: (B, L, width), of the words' slots -> scalar, the mean over captions of the mean of -log p of each
        word but the first, given those before it. (DALL-E divides by the number of words in the batch, which parts of a
        batch do not know.)"""
        target, told = tokens[:, 1:, 0].long(), mask[:, 1:]
        logits = widened(self.head(states[:, :-1])).flatten(0, 1)
        losses = F.cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)
        return ((losses * told).sum(1) / told.sum(1).clamp(min=1)).mean()


def check_vocabulary(vocabulary: int, words: int) -> None:
    """Raises ConfigError where the table has too few rows for the words."""
    allowed = f"{words:,} or more, the words of the tokenizer"
    check(vocabulary >= words, "transformer.vocabulary", vocabulary, allowed)
