"""MaskGIT's transformer (Chang et al. 2202.04200): BERT (1810.04805), without its segments, over codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.families.masked.config import MaskGITConfig
from t2i.families.masked.network import MaskedTransformer
from t2i.nn.norm import LayerNorm
from t2i.nn.once import once

EPS = 1e-12  # of BERT's layer norms


class Bert(nn.Module):
    """Token embeddings, blocks with the norm after each sum, and logits by the embeddings themselves.

    vocabulary: how many tokens there are; MaskGIT has the codes, ImageNet's classes and the mask
    positions: learned ones, one for each place of a sequence
    """

    def __init__(self, config: MaskGITConfig, vocabulary: int, positions: int) -> None:
        super().__init__()
        width = config.width
        # In a container: the words are used for the logits too, so that FSDP keeps them for the whole pass.
        self.embeddings = nn.ParameterDict(
            {"words": torch.empty(vocabulary, width), "positions": torch.empty(positions, width)}
        )
        for table in self.embeddings.values():
            truncated_normal(table)
        self.norm = LayerNorm(width, eps=EPS)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([BertBlock(config) for _ in range(config.depth)])
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU("tanh"), LayerNorm(width, eps=EPS))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.apply(_initialise)

    def forward(self, tokens: Tensor, prefix: Tensor | None = None, attended: Tensor | None = None) -> Tensor:
        """tokens: (B, N) int64; prefix: (B, L, width) states before them; attended: (B, L) bool, those of the prefix
        that are attended to -> (B, N, vocabulary)."""
        words, positions = self.embeddings["words"], self.embeddings["positions"]
        h = self.dropout(self.norm(F.embedding(tokens, words) + positions[: tokens.shape[1]]))
        mask = None
        if prefix is not None:
            h = torch.cat([prefix, h], dim=1)
            if attended is not None:
                mask = F.pad(attended, (0, tokens.shape[1]), value=True)[:, None, None, :]
        for block in self.blocks:
            h = block(h, mask)
        return F.linear(self.head(h[:, -tokens.shape[1] :]), words, self.bias)


class BertBlock(nn.Module):
    """Self-attention and an MLP of four times the width, each added and then normalised."""

    def __init__(self, config: MaskGITConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.rate = config.heads, config.dropout
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.norm_attention, self.norm_mlp = LayerNorm(width, eps=EPS), LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(self.rate)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """h: (B, N, width); mask: (B, 1, 1, N) bool, True where attended to."""
        q, k, v = (
            to(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )
        rate = self.rate if self.training else 0.0
        attention = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        h = self.norm_attention(h + self.dropout(self.to_out(attention.transpose(1, 2).flatten(2))))
        return self.norm_mlp(h + self.dropout(self.mlp(h)))


class MaskGIT(MaskedTransformer):
    """With the caption's token states before the codes, where the published one has the class."""

    def __init__(
        self, config: MaskGITConfig, num_codes: int, shape: tuple[int, int], context_dim: int
    ) -> None:
        super().__init__(num_codes)
        self.bert = Bert(config, num_codes + 1, shape[0] * shape[1])
        self.text = nn.Sequential(nn.Linear(context_dim, config.width), LayerNorm(config.width, eps=EPS))
        self.text.apply(_initialise)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        context_mask: Tensor,
        low: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        logits = self.bert(tokens.flatten(1), once(self.text, context), context_mask)
        return logits[..., : self.num_codes]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        truncated_normal(module.weight)
        nn.init.zeros_(module.bias)


def truncated_normal(weight: Tensor) -> None:
    """BERT's start."""
    nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
