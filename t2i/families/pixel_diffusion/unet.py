"""ADM's UNet (Dhariwal & Nichol 2105.05233), conditioned on text as GLIDE's is (Nichol et al. 2112.10741).

Topology and module names are those of guided-diffusion's `UNetModel`; what is a class embedding there is a linear
layer without bias here, which on one-hot vectors is the same. As there, the embedding of the time and the last layers
are in single precision, autocast or not.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.families.pixel_diffusion.unet_config import UNetConfig
from t2i.nn.embeddings import sincos_2d, timestep_embedding
from t2i.nn.norm import GroupNorm, RMSNorm
from t2i.nn.once import once
from t2i.nn.precision import widened, without_autocast
from t2i.nn.residual import Downsample, ResidualBlock, Upsample, doubled, zero_init
from t2i.nn.unet import MapAttention, Stack, hidden_matrices, time_network

POSITION_SPAN = 16.0  # positions run from 0 to this along the longer side, whatever the resolution


def config_norm(config: UNetConfig, channels: int) -> GroupNorm:
    """In `config.norm_groups` groups. Each is normalised over the picture: of a picture of one colour, groups of two
    channels leave no more than a sign."""
    return GroupNorm(config.norm_groups, channels)


class ResBlock(ResidualBlock):
    """A residual block whose time embedding scales and shifts after the second norm (2105.05233, section 3.1, AdaGN),
    and which may halve or double height and width between the first norm and convolution (BigGAN's)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int,
        config: UNetConfig,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, time_dim, config.dropout)
        self.in_layers[0], self.out_layers[0] = (
            config_norm(config, in_channels),
            config_norm(config, out_channels),
        )
        self.scale_shift_norm = config.scale_shift_norm
        self.resample = resample
        if config.scale_shift_norm:
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * out_channels))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return doubled(x) if self.resample == "up" else x

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """x: (B, in_channels, h, w), time_embedding: (B, time_dim) -> (B, out_channels, h', w')."""
        norm, activation, conv = self.in_layers
        h = conv(self._resampled(activation(norm(x))))
        embedding = self.emb_layers(time_embedding)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = embedding.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + embedding)
        return self.skip_connection(self._resampled(x)) + h


class AttentionBlock(MapAttention):
    """x + attention of the positions of a map to one another and, with context, to the tokens of the caption, whose
    keys and values stand beside those of the positions (2112.10741, section 3.1). Starts as the identity."""

    def __init__(self, channels: int, config: UNetConfig, context_dim: int | None = None) -> None:
        super().__init__()
        self.heads = config.heads(channels)
        self.position_embedding = config.position_embedding
        head_dim = channels // self.heads
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.norm = config_norm(config, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.encoder_kv = None if context_dim is None else nn.Linear(context_dim, 2 * channels)
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """x: (B, C, h, w), context: (B, L, context_dim), context_mask: (B, L) bool, True where a token may be attended
        to -> (B, C, h, w)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        if self.position_embedding:
            rows, columns = x.shape[2:]
            scale = max(rows, columns) / POSITION_SPAN
            tokens = tokens + sincos_2d(rows, columns, x.shape[1], scale, x.device).to(x)
        q, k, v = (self._split_heads(each) for each in self.qkv(tokens).chunk(3, dim=-1))
        mask = None
        if self.encoder_kv is not None and context is not None:
            context_k, context_v = (
                self._split_heads(e) for e in once(self.encoder_kv, context).chunk(2, dim=-1)
            )
            k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
            if context_mask is not None:
                mask = F.pad(context_mask, (0, tokens.shape[1]), value=True)[:, None, None]
        h = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, attn_mask=mask)
        h = self.proj_out(h.transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Encoder(nn.Module):
    """The way down and the middle block: half of the UNet, and nearly all of ADM's classifier.

    skip_channels: of what each of the input blocks puts out
    out: the last layers, which each kind has of its own
    """

    out: nn.Module

    def __init__(self, config: UNetConfig, in_channels: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.context_dim = context_dim if config.cross_attention else None
        time_dim = 4 * config.model_channels
        self.time_embed = time_network(config.model_channels)
        widths = config.channels()
        channels = widths[0]
        patch_channels = in_channels * config.patch_size**2
        self.input_blocks = nn.ModuleList([Stack(nn.Conv2d(patch_channels, channels, 3, padding=1))])
        self.skip_channels = [channels]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stack(*self.layers(channels, width, level)))
                channels = width
                self.skip_channels.append(channels)
            if level < len(widths) - 1:
                down = (
                    ResBlock(channels, channels, time_dim, config, "down")
                    if config.resblock_updown
                    else Downsample(channels)
                )
                self.input_blocks.append(Stack(down))
                self.skip_channels.append(channels)
        self.middle_block = Stack(
            ResBlock(channels, channels, time_dim, config),
            AttentionBlock(channels, config, self.context_dim),
            ResBlock(channels, channels, time_dim, config),
        )

    def layers(self, in_channels: int, out_channels: int, level: int) -> list[nn.Module]:
        """A residual block of a level, and its attention where it has that."""
        config = self.config
        layers: list[nn.Module] = [ResBlock(in_channels, out_channels, 4 * config.model_channels, config)]
        if 2**level in config.attention_resolutions:
            layers.append(AttentionBlock(out_channels, config, self.context_dim))
        return layers

    def embedded(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) times -> (B, 4 model_channels)."""
        with without_autocast(t.device):
            return self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))

    def encode(
        self, x: Tensor, time: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The middle block's map, and those of the input blocks in their order. Raises ValueError where height or
        width does not divide."""
        height, width = x.shape[2:]
        multiple = self.config.downsampling
        if height % multiple or width % multiple:
            raise ValueError(f"the picture is {height} x {width}; both must be multiples of {multiple}")
        x = F.pixel_unshuffle(x, self.config.patch_size).contiguous(memory_format=torch.channels_last)
        skips = []
        for block in self.input_blocks:
            x = block(x, time, context, context_mask)
            skips.append(x)
        return self.middle_block(x, time, context, context_mask), skips

    def last(self, h: Tensor) -> Tensor:
        """Through `out`."""
        with without_autocast(h.device):
            return self.out(widened(h))

    def hidden_matrices(self) -> list[nn.Parameter]:
        return hidden_matrices(self)


class UNet(Encoder):
    """Predicts the noise, or x_0 or v, of a noisy picture given the time and the text, and where it is learned the
    variance beside it."""

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        out_channels: int,
        condition_dim: int | None = None,
        context_dim: int | None = None,
    ) -> None:
        """condition_dim: width of the vector that is added to the time embedding, None for none
        context_dim: width of the text tokens, unused where config.cross_attention is false"""
        super().__init__(config, in_channels, context_dim)
        time_dim = 4 * config.model_channels
        self.label_emb: nn.Module | None = None
        if condition_dim is not None:
            self.label_emb = nn.Linear(condition_dim, time_dim, bias=False)
        widths = config.channels()
        channels, skip_channels = widths[-1], list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                layers = self.layers(channels + skip_channels.pop(), width, level)
                channels = width
                if level > 0 and i == config.num_res_blocks:
                    layers.append(
                        ResBlock(channels, channels, time_dim, config, "up")
                        if config.resblock_updown
                        else Upsample(channels)
                    )
                self.output_blocks.append(Stack(*layers))
        out_conv = nn.Conv2d(channels, out_channels * config.patch_size**2, 3, padding=1)
        self.out = nn.Sequential(config_norm(config, channels), nn.SiLU(), zero_init(out_conv))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """x: (B, in_channels, H, W) noisy pictures, H and W multiples of `config.downsampling`;
        t: (B,) in [0, 1000), whole or fractional; condition: (B, condition_dim); context: (B, L, context_dim) text
        tokens; context_mask: (B, L) bool, True where a token may be attended to, None for all
        -> (B, out_channels, H, W). Raises ValueError where H or W does not divide."""
        time = self.embedded(t, x.dtype)
        if self.label_emb is not None:
            time = time + self.label_emb(condition)
        x, skips = self.encode(x, time, context, context_mask)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), time, context, context_mask)
        return F.pixel_shuffle(self.last(x), self.config.patch_size)
