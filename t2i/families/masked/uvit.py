"""aMUSEd's U-ViT (Patil et al. 2401.01808): a transformer between convolutional blocks over picture codes. Its weights
are named and shaped as diffusers' `UVit2DModel` has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.families.masked.config import UVitConfig
from t2i.families.masked.network import MaskedTransformer
from t2i.nn.attention import Attention
from t2i.nn.embeddings import timestep_embedding
from t2i.nn.norm import RMSNorm
from t2i.nn.once import once
from t2i.nn.transfer import placed

EPS = 1e-6
CONDITION_DIM = 256  # of each number that is told beside the text
AESTHETIC_SCORE = 6.0  # what the pipeline asks for


class UVit(MaskedTransformer):
    """Each block is told the caption's pooled vector and five numbers: the picture's width and height in pixels, no
    crop (0, 0) and an aesthetic score. It attends to the caption's padding, as the published one does.

    pooled_dim: of the pooled vector; downsampling: pixels of a code along a side
    """

    def __init__(
        self, config: UVitConfig, num_codes: int, context_dim: int, pooled_dim: int, downsampling: int
    ) -> None:
        vocabulary = config.vocabulary or num_codes + 1
        super().__init__(
            num_codes, takes_any_shape=True, unit=2 if config.downsample else 1, mask_token=vocabulary - 1
        )
        self.downsampling = downsampling
        width, channels = config.width, config.channels
        self.encoder_proj = linear(context_dim, width)
        self.encoder_proj_layer_norm = RMSNorm(width, eps=EPS)
        self.embed = Embed(vocabulary, config.embedding_dim, channels)
        self.cond_embed = nn.ModuleDict(
            {"linear_1": linear(5 * CONDITION_DIM + pooled_dim, width), "linear_2": linear(width, width)}
        )
        self.down_block = Side(config, down=config.downsample)
        self.project_to_hidden_norm = RMSNorm(channels, eps=EPS)
        self.project_to_hidden = linear(channels, width)
        self.transformer_layers = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.project_from_hidden_norm = RMSNorm(width, eps=EPS)
        self.project_from_hidden = linear(width, channels)
        self.up_block = Side(config, up=config.downsample)
        self.mlm_layer = Head(channels, config.embedding_dim, num_codes)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        context_mask: Tensor,
        low: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        assert pooled is not None
        context = once(self.states, context)
        condition = self.condition(pooled, tokens.shape[1], tokens.shape[2])
        x = self.down_block(self.embed(tokens), condition, context)
        rows = x.shape[1]
        h = self.project_to_hidden(self.project_to_hidden_norm(x.flatten(1, 2)))
        for layer in self.transformer_layers:
            h = layer(h, condition, context)
        h = self.project_from_hidden(self.project_from_hidden_norm(h))
        x = self.up_block(h.unflatten(1, (rows, -1)), condition, context)
        return self.mlm_layer(x).flatten(1, 2)

    def states(self, context: Tensor) -> Tensor:
        """(B, L, context_dim) -> (B, L, width), as all layers attend to them."""
        return self.encoder_proj_layer_norm(self.encoder_proj(context))

    def condition(self, pooled: Tensor, rows: int, columns: int) -> Tensor:
        """(B, width), through SiLU, as all layers take it."""
        f = self.downsampling
        dtype = torch.promote_types(pooled.dtype, torch.float32)
        numbers = torch.tensor([columns * f, rows * f, 0.0, 0.0, AESTHETIC_SCORE], dtype=dtype)
        told = placed(timestep_embedding(numbers, CONDITION_DIM).flatten(), pooled.device).to(pooled.dtype)
        both = torch.cat([pooled, told.expand(len(pooled), -1)], dim=1)
        return F.silu(self.cond_embed["linear_2"](F.silu(self.cond_embed["linear_1"](both))))


class Embed(nn.Module):
    """(B, h, w) int64 -> (B, h, w, channels)."""

    def __init__(self, vocabulary: int, dim: int, channels: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, dim)
        self.layer_norm = RMSNorm(dim, eps=EPS)
        self.conv = nn.Conv2d(dim, channels, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return pointwise(self.conv, self.layer_norm(self.embeddings(tokens)))


class Head(nn.Module):
    """(B, h, w, channels) -> (B, h, w, num_codes)."""

    def __init__(self, channels: int, dim: int, num_codes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.layer_norm = RMSNorm(dim, eps=EPS)
        self.conv2 = nn.Conv2d(dim, num_codes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(self.conv2, self.layer_norm(pointwise(self.conv1, x)))


class Side(nn.Module):
    """The convolutional blocks before or after the transformer, each with an attention to the caption.

    down, up: whether the sides are halved first, or doubled last
    """

    def __init__(self, config: UVitConfig, down: bool = False, up: bool = False) -> None:
        super().__init__()
        channels = config.channels
        self.downsample = Resample(nn.Conv2d(channels, channels, 2, 2, bias=False)) if down else None
        self.res_blocks = nn.ModuleList([ConvNext(config) for _ in range(config.conv_blocks)])
        self.attention_blocks = nn.ModuleList([ToCaption(config) for _ in range(config.conv_blocks)])
        self.upsample = Resample(nn.ConvTranspose2d(channels, channels, 2, 2, bias=False)) if up else None

    def forward(self, x: Tensor, condition: Tensor, context: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        context = F.silu(context)
        for block, attention in zip(self.res_blocks, self.attention_blocks, strict=True):
            x = block(x, condition)
            x = attention(x.flatten(1, 2), context).view_as(x)
        return x if self.upsample is None else self.upsample(x)


class Resample(nn.Module):
    """(B, h, w, channels) -> the same of another size."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        super().__init__()
        self.norm = RMSNorm(conv.in_channels, eps=EPS)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).movedim(-1, 1)).movedim(1, -1)


class ConvNext(nn.Module):
    """A block of ConvNeXt V2 (2301.00808), then scaled and shifted by the condition. (B, h, w, channels), as given."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        channels = config.channels
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = RMSNorm(channels, eps=EPS)
        self.channelwise_linear_1 = linear(channels, 4 * channels)
        self.channelwise_norm = GlobalResponseNorm(4 * channels)
        self.channelwise_linear_2 = linear(4 * channels, channels)
        self.dropout = nn.Dropout(config.dropout)
        self.cond_embeds_mapper = linear(config.width, 2 * channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x.movedim(-1, 1)).movedim(1, -1))
        h = self.channelwise_norm(F.gelu(self.channelwise_linear_1(h)))
        x = x + self.dropout(self.channelwise_linear_2(h))
        scale, shift = self.cond_embeds_mapper(condition)[:, None, None].chunk(2, dim=-1)
        return x * (1 + scale) + shift


class GlobalResponseNorm(nn.Module):
    """Channels against one another by their norm over the picture (2301.00808, algorithm 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x * (1 + self.gamma * norm / (norm.mean(-1, keepdim=True) + EPS)) + self.beta


class CodeAttention(Attention):
    """Without biases."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__(dim, context_dim, heads=heads, head_dim=dim // heads)
        self.to_out = nn.Sequential(linear(dim, dim))


class ToCaption(nn.Module):
    """Twice an attention to the caption. context: (B, L, width), through SiLU."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        channels = config.channels
        self.kv_mapper = linear(config.width, channels)
        self.norm1, self.norm2 = RMSNorm(channels, eps=EPS), RMSNorm(channels, eps=EPS)
        self.attn1, self.attn2 = (CodeAttention(channels, config.conv_heads, channels) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        context = once(self.kv_mapper, context)
        x = x + self.attn1(self.norm1(x), context)
        return x + self.attn2(self.norm2(x), context)


class AdaptiveNorm(nn.Module):
    """A norm, scaled and shifted by the condition."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.linear, self.norm = linear(width, 2 * width), norm

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.linear(condition)[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, attention to the caption, and a gated MLP."""

    def __init__(self, config: UVitConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = (AdaptiveNorm(RMSNorm(width, eps=EPS), width) for _ in range(2))
        self.norm3 = AdaptiveNorm(nn.LayerNorm(width, eps=EPS, bias=False), width)
        self.attn1 = CodeAttention(width, config.heads)
        self.attn2 = CodeAttention(width, config.heads, width)
        self.ff = GatedMLP(width, config.hidden)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor) -> Tensor:
        x = x + self.dropout(self.attn1(self.norm1(x, condition)))
        x = x + self.dropout(self.attn2(self.norm2(x, condition), context))
        return x + self.dropout(self.ff(self.norm3(x, condition)))


class GatedMLP(nn.Module):
    """GEGLU (2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        gate = nn.ModuleDict({"proj": linear(width, 2 * hidden)})
        self.net = nn.ModuleDict({"0": gate, "2": linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net["0"]["proj"](x).chunk(2, dim=-1)  # type: ignore[index]
        return self.net["2"](value * F.gelu(gate))


def linear(taken: int, given: int) -> nn.Linear:
    return nn.Linear(taken, given, bias=False)


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of (B, h, w, channels)."""
    return F.linear(x, conv.weight[..., 0, 0])
