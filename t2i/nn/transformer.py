"""A transformer over tokens, causal or not: its blocks, with what drawing one token after the other keeps of the ones
before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.nn.norm import LayerNorm, RMSNorm
from t2i.nn.once import once
from t2i.nn.transformer_config import TransformerConfig

Rotation = tuple[Tensor, Tensor]  # angles of the queries and of the keys, (N, head_dim / 2) each


class Cache:
    """What a block keeps: keys and values of the tokens so far, and of the context, which `once` would not keep in
    compiled blocks.

    capacity: how many tokens there will be at most; memory for all of them is taken when the first come
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.kept: tuple[Tensor, Tensor] | None = None
        self.context: tuple[Tensor, Tensor, Tensor | None] | None = (
            None  # keys, values and which of them are seen
        )

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, heads, N, head_dim) of N further tokens -> those of all tokens so far."""
        if self.kept is None:
            batch, heads, _, dim = keys.shape
            self.kept = tuple(x.new_empty(batch, heads, self.capacity, dim) for x in (keys, values))  # type: ignore[assignment]
        assert self.kept is not None
        first, self.length = self.length, self.length + keys.shape[2]
        for kept, new in zip(self.kept, (keys, values), strict=True):
            kept[:, :, first : self.length] = new
        return self.kept[0][:, :, : self.length], self.kept[1][:, :, : self.length]


def rotary_2d(rows: int, columns: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """(rows * columns, head_dim / 2) float32 angles by which the places of a grid turn the pairs of a head's numbers:
    half of the pairs by the row, half by the column (2104.09864, on two axes as in 2403.13298).

    head_dim: a multiple of 4
    """
    frequency = 10_000.0 ** -(torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    row = torch.arange(rows, device=device)[:, None, None] * frequency
    column = torch.arange(columns, device=device)[None, :, None] * frequency
    grid = torch.cat([row.expand(-1, columns, -1), column.expand(rows, -1, -1)], dim=2)
    return grid.flatten(0, 1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """(B, heads, N, head_dim), number i and number i + head_dim / 2 of each head turned by angles (N, head_dim / 2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def norm_of(config: TransformerConfig, width: int) -> nn.Module:
    return RMSNorm(width, eps=1e-5) if config.norm == "rms" else LayerNorm(width)


class TokenAttention(nn.Module):
    """Multi-head attention (1706.03762) of tokens to themselves or to a context.

    context_width: of what keys and values are read from; None: the tokens themselves
    """

    def __init__(self, config: TransformerConfig, context_width: int | None = None) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        source = width if context_width is None else context_width
        self.to_q = nn.Linear(width, width, bias=config.bias)
        self.to_k = nn.Linear(source, width, bias=config.bias)
        self.to_v = nn.Linear(source, width, bias=config.bias)
        self.to_out = nn.Linear(width, width, bias=config.bias)
        head_dim = width // config.heads
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x: (B, N, width); mask: bool that broadcasts to (B, heads, N, keys), True where the key is seen; causal: a
        token sees those up to itself; rotation: of x's queries and keys; cache: x are the tokens after its -> as x"""
        q, (k, v) = self.norm_q(self._heads(self.to_q(x))), self.keys_and_values(x)
        if rotation is not None:
            q, k = rotated(q, rotation[0]), rotated(k, rotation[1])
        if cache is not None:
            k, v = cache.extended(k, v)
            causal = causal and q.shape[2] > 1  # the newest sees all
        return self.attend(q, k, v, mask, causal)

    def to_context(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, N, width); keys, values: of the context; mask: (B, L) bool, True where it is seen -> as x"""
        seen = None if mask is None else mask[:, None, None]
        return self.attend(self.norm_q(self._heads(self.to_q(x))), keys, values, seen, causal=False)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, context_width) -> (B, heads, L, head_dim) twice."""
        return self.norm_k(self._heads(self.to_k(context))), self._heads(self.to_v(context))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.to_out(h.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x) (1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TokenBlock(nn.Module):
    """Self-attention, where there is a context attention to it, and an MLP, each before a norm and added.

    context_width: of the context; None where there is none
    """

    def __init__(self, config: TransformerConfig, context_width: int | None = None) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.norm_1 = norm_of(config, width)
        self.attention = TokenAttention(config)
        self.cross_attention: TokenAttention | None = None
        if context_width is not None:
            self.norm_cross = norm_of(config, width)
            self.cross_attention = TokenAttention(config, context_width)
        self.norm_2 = norm_of(config, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden, bias=config.bias),
            nn.GELU() if config.activation == "gelu" else QuickGELU(),
            nn.Linear(hidden, width, bias=config.bias),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        rotation: Rotation | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x: (B, N, width); context: (B, L, context_width), which a cache that is not empty has; context_mask: (B, L)
        bool, True where it is seen; the others as `TokenAttention` takes them -> as x"""
        h = self.attention(self.norm_1(x), mask, causal, rotation, cache)
        x = x + self.dropout(h)
        if self.cross_attention is not None:
            kept = None if cache is None else cache.context
            if kept is None:
                assert context is not None
                kept = (*once(self.cross_attention.keys_and_values, context), context_mask)
            if cache is not None:
                cache.context = kept
            x = x + self.dropout(self.cross_attention.to_context(self.norm_cross(x), *kept))
        return x + self.dropout(self.mlp(self.norm_2(x)))


def initialise(network: nn.Module, depth: int, std: float = 0.02) -> None:
    """GPT-2's start: matrices and tables ~ N(0, std^2), biases zero, and what a block adds smaller by the square
    root of the number of branches, 2 a block."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            is_last = name.endswith(("to_out", "mlp.2"))
            nn.init.normal_(module.weight, std=std / (2 * depth) ** 0.5 if is_last else std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
