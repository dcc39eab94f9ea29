"""The text-conditioned UNet of latent diffusion (Rombach et al., arXiv:2112.10752).

Same topology and parameter names as CompVis' `UNetModel`, so that Stable Diffusion 1 and 2 and LDM weights
load as they are, once the prefix `model.diffusion_model.` is cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.families.latent_diffusion.unet_config import UNetConfig
from t2i.interfaces import TextFeatures
from t2i.nn.attention import Attention
from t2i.nn.denoiser import Denoiser
from t2i.nn.embeddings import timestep_embedding
from t2i.nn.norm import LayerNorm, group_norm
from t2i.nn.residual import Downsample, ResidualBlock, Upsample, zero_init
from t2i.nn.unet import MapAttention, Stack, hidden_matrices, time_network


class GEGLU(nn.Module):
    """(B, N, dim) -> (B, N, hidden_dim): a linear unit gated by GELU (Shazeer, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, dim) -> (B, N, dim) through a GEGLU four times as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # CompVis has a dropout, always 0, between the two: the identity keeps its place in the names.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each pre-normalised and residual."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(dim, heads=heads, head_dim=dim // heads)
        self.attn2 = Attention(dim, context_dim, heads=heads, head_dim=dim // heads)
        self.ff = FeedForward(dim)
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)
        self.norm3 = LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        """x: (B, N, dim), context: (B, L, context_dim), context_mask: (B, L) bool -> (B, N, dim)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, context_mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(MapAttention):
    """A residual transformer over the h * w positions of a feature map; starts as the identity."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.use_linear_in_transformer
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = self._projection(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.context_dim, config.heads(channels))
            for _ in range(config.transformer_depth)
        )
        self.proj_out = zero_init(self._projection(channels))

    def _projection(self, channels: int) -> nn.Module:
        return nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        """x: (B, C, h, w), context: (B, L, context_dim), context_mask: (B, L) bool -> (B, C, h, w)."""
        size = x.shape[2:]
        h = self.norm(x)
        h = self.proj_in(_to_tokens(h)) if self.linear else _to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context, context_mask)
        h = _to_map(self.proj_out(h), size) if self.linear else self.proj_out(_to_map(h, size))
        return x + h


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return x.flatten(2).transpose(1, 2)


def _to_map(x: Tensor, size: torch.Size) -> Tensor:
    """(B, h * w, C) -> (B, C, h, w)."""
    return x.transpose(1, 2).unflatten(2, size)


class UNet(Denoiser):
    """Predicts noise, or v, of a noisy latent given the time and the text."""

    has_positions = False

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        time_dim = 4 * config.model_channels
        self.time_embed = time_network(config.model_channels)

        def residual(in_channels: int, out_channels: int) -> ResidualBlock:
            return ResidualBlock(in_channels, out_channels, time_dim, config.dropout)

        def residual_and_attention(in_channels: int, out_channels: int, level: int) -> list[nn.Module]:
            layers: list[nn.Module] = [residual(in_channels, out_channels)]
            if 2**level in config.attention_resolutions:
                layers.append(SpatialTransformer(out_channels, config))
            return layers

        channels = config.model_channels
        self.input_blocks = nn.ModuleList([Stack(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        skip_channels = [channels]
        last_level = len(config.channel_mult) - 1
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                out_channels = mult * config.model_channels
                self.input_blocks.append(Stack(*residual_and_attention(channels, out_channels, level)))
                channels = out_channels
                skip_channels.append(channels)
            if level != last_level:
                self.input_blocks.append(Stack(Downsample(channels)))
                skip_channels.append(channels)

        self.middle_block = Stack(
            residual(channels, channels), SpatialTransformer(channels, config), residual(channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                out_channels = mult * config.model_channels
                layers = residual_and_attention(channels + skip_channels.pop(), out_channels, level)
                channels = out_channels
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Stack(*layers))

        out_conv = zero_init(nn.Conv2d(channels, config.out_channels, 3, padding=1))
        self.out = nn.Sequential(group_norm(channels), nn.SiLU(), out_conv)

    def conditioned(self, x: Tensor, t: Tensor, text: TextFeatures, mask: Tensor | None) -> Tensor:
        return self(x, t, text.tokens, mask)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return hidden_matrices(self)

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of an ordinary UNet for one that inpaints: what is added to its input counts for nothing at first."""
        name = "input_blocks.0.0.weight"
        first = weights[name]
        added = max(0, self.config.in_channels - first.shape[1])
        return dict(weights) | {name: F.pad(first, (0, 0, 0, 0, 0, added))}

    def forward(self, x: Tensor, t: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """x: (B, in_channels, h, w) noisy latent, h and w multiples of `config.downsampling`;
        t: (B,) in [0, 1000), whole or fractional; context: (B, L, context_dim) text tokens;
        context_mask: (B, L) bool, True where a token may be attended to, None for all
        -> (B, out_channels, h, w). Raises ValueError where h or w does not divide."""
        height, width = x.shape[2:]
        multiple = self.config.downsampling
        if height % multiple or width % multiple:
            raise ValueError(f"the latent is {height} x {width}; both must be multiples of {multiple}")
        time = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, time, context, context_mask)
            skips.append(x)
        x = self.middle_block(x, time, context, context_mask)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), time, context, context_mask)
        return self.out(x)
