"""Multi-head dot-product attention (Vaswani et al., arXiv:1706.03762)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from t2i.nn.norm import RMSNorm
from t2i.nn.once import once


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v over `heads` heads, projected back to `dim`.

    dim: width of the queries and of the result
    context_dim: width of the context that keys and values are read from; None for self-attention
    qkv_bias: gives the three input projections a bias (the output projection always has one)
    qk_norm: RMS-normalises queries and keys per head, which bounds the logits (arXiv:2302.05442)
    """

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        *,
        heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        inner_dim = heads * head_dim
        context_dim = dim if context_dim is None else context_dim
        self.to_q = nn.Linear(dim, inner_dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=qkv_bias)
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.Sequential(nn.Linear(inner_dim, dim))  # CompVis names it `to_out.0`

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: (B, N, dim); context: (B, L, context_dim), x itself where None; mask: (B, L) bool, True where
        the key may be attended to -> (B, N, dim). Where all keys are masked, attention contributes zero."""
        q = self.norm_q(self._split_heads(self.to_q(x)))
        k, v = self._keys_values(x) if context is None else once(self._keys_values, context)
        if mask is None:
            h = F.scaled_dot_product_attention(q, k, v)
        else:
            # A softmax over no keys can be NaN: let such rows see all keys, then drop the result.
            empty = ~mask.any(dim=1, keepdim=True)
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | empty)[:, None, None, :])
            h = h.masked_fill(empty[:, None, None, :], 0.0)
        return self.to_out(h.transpose(1, 2).flatten(2))

    def _keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.norm_k(self._split_heads(self.to_k(context)))
        return keys, self._split_heads(self.to_v(context))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
