"""A diffusion transformer with cross-attention to text (DiT, 2212.09748; PixArt-alpha, 2310.00426), and where
asked convolutions after it at a finer resolution than that of the tokens, which join what neighbouring tokens draw (as
U-ViT's last layer does, 2209.12152)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from t2i.interfaces import TextFeatures
from t2i.nn.attention import Attention
from t2i.nn.denoiser import Denoiser
from t2i.nn.dit_config import DiTConfig
from t2i.nn.embeddings import sincos_2d, timestep_embedding
from t2i.nn.norm import group_norm
from t2i.nn.once import once
from t2i.nn.residual import zero_init

POSITION_SPAN = 16.0  # positions run from 0 to this along the longer side, whatever the resolution


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, D) by (B, D): adaptive layer norm's affine part."""
    return x * (1 + scale[:, None]) + shift[:, None]


def unpatchify(tokens: Tensor, rows: int, patch_size: int) -> Tensor:
    """(B, N, C * patch_size**2) -> (B, C, h, w) with h = rows * patch_size."""
    p = patch_size
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)


def enlarge_patches(weight: Tensor, patch_size: int, factor: int) -> Tensor:
    """(C * patch_size**2, ...) -> (C * (factor * patch_size)**2, ...): nearest-neighbour upsampling."""
    p, k = patch_size, factor
    return repeat(weight, "(c p q) ... -> (c p k q l) ...", p=p, q=p, k=k, l=k)


class DiTBlock(nn.Module):
    """Self-attention and MLP under adaLN-Zero (2212.09748, figure 3), with cross-attention to text between."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.width // config.heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads=config.heads, head_dim=head_dim, qk_norm=True)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attention = Attention(width, width, heads=config.heads, head_dim=head_dim, qk_norm=True)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=False)
        hidden = config.mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.modulation = zero_init(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        """x: (B, N, D); condition: (B, D) time and pooled text; context: (B, L, D); context_mask: (B, L)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross_attention(self.norm2(x), context, context_mask)
        return x + gate2[:, None] * self.mlp(modulate(self.norm3(x), shift2, scale2))


class RefinerBlock(nn.Module):
    """Residual block of two 3x3 convolutions under adaLN-Zero."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = zero_init(nn.Linear(condition_dim, 3 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: (B, channels, h, w); condition: (B, condition_dim)."""
        shift, scale, gate = self.modulation(condition)[:, :, None, None].chunk(3, dim=1)
        h = self.norm(x) * (1 + scale) + shift
        return x + gate * self.conv2(nn.functional.silu(self.conv1(h)))


class Refiner(nn.Module):
    """What is added to the transformer's output: convolutions over the noisy input and the tokens. Starts at
    zero."""

    def __init__(self, config: DiTConfig, in_channels: int) -> None:
        super().__init__()
        channels = config.refiner_width
        self.patch_size = config.refiner_patch_size
        self.token_size = config.patch_size // self.patch_size  # positions of the convolutions per token
        patch_channels = in_channels * self.patch_size**2
        self.embed = nn.Conv2d(patch_channels, channels, 3, padding=1)
        self.features = nn.Linear(config.width, channels * self.token_size**2)
        self.blocks = nn.ModuleList(RefinerBlock(channels, config.width) for _ in range(config.refiner_depth))
        self.norm = group_norm(channels)
        self.modulation = zero_init(nn.Linear(config.width, 2 * channels))
        self.out = zero_init(nn.Conv2d(channels, patch_channels, 3, padding=1))

    def forward(self, x: Tensor, tokens: Tensor, condition: Tensor) -> Tensor:
        """x: (B, in_channels, h, w); tokens: (B, N, width); condition: (B, width) -> like x."""
        x = nn.functional.pixel_unshuffle(x, self.patch_size)
        features = unpatchify(self.features(tokens), x.shape[2] // self.token_size, self.token_size)
        h = self.embed(x.contiguous(memory_format=torch.channels_last)) + features
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        out = self.out(nn.functional.silu(self.norm(h) * (1 + scale) + shift))
        return nn.functional.pixel_shuffle(out, self.patch_size)


class DiT(Denoiser):
    """Denoiser over latents or pictures (B, channels, h, w); h and w must be multiples of patch_size."""

    def __init__(self, config: DiTConfig, channels: int, context_dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.patch_size, width = config.patch_size, config.width
        self.refiner_patch_size = config.refiner_patch_size
        patch_dim = channels * config.patch_size**2
        self.embed = nn.Linear(patch_dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled = nn.Sequential(nn.LayerNorm(pooled_dim), nn.Linear(pooled_dim, width))
        self.context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, width))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_init(nn.Linear(width, 2 * width))
        self.out = zero_init(nn.Linear(width, patch_dim))
        self.refiner: nn.Module | None = None
        if config.refiner_depth > 0:
            self.refiner = Refiner(config, channels).to(memory_format=torch.channels_last)

    def conditioned(self, x: Tensor, t: Tensor, text: TextFeatures, mask: Tensor | None) -> Tensor:
        return self(x, t, text.tokens, text.pooled, mask)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights between hidden layers, which Muon may step: those of attention, MLPs and convolutions,
        without embeddings, modulations and outputs."""
        return [
            p
            for name, p in self.named_parameters()
            if "blocks." in name and "modulation" not in name and p.ndim >= 2
        ]

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a DiT whose patches are a whole number of times smaller, for these patches: for a
        latent upsampled by that number, tokens are what they were and the output is upsampled too. For the
        embedding that is FlexiViT's pseudo-inverse resize (2212.08013, section 3.4)."""
        fitted = dict(weights)
        old = math.isqrt(weights["embed.weight"].shape[1] * self.patch_size**2 // self.embed.in_features)
        factor, remainder = divmod(self.patch_size, old)
        if remainder == 0 and factor > 1:
            fitted["embed.weight"] = enlarge_patches(weights["embed.weight"].T, old, factor).T / factor**2
            for layer, size in (("out", old), ("refiner.features", old // self.refiner_patch_size)):
                for name in (f"{layer}.weight", f"{layer}.bias"):
                    if name in weights:
                        fitted[name] = enlarge_patches(weights[name], size, factor)
        return fitted

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, context_mask: Tensor | None = None
    ) -> Tensor:
        """x: (B, C, h, w); t: (B,) in [0, 1000); context: (B, L, context_dim); pooled: (B, pooled_dim);
        context_mask: (B, L) bool, True where attended -> (B, C, h, w)."""
        p = self.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        scale = max(rows, columns) / POSITION_SPAN
        position = sincos_2d(rows, columns, self.embed.out_features, scale, x.device)
        tokens = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)) + position.to(x)
        time = timestep_embedding(t, self.embed.out_features).to(x.dtype)
        condition = nn.functional.silu(self.time(time) + self.pooled(pooled))
        text = once(self.context, context)
        for block in self.blocks:
            tokens = block(tokens, condition, text, context_mask)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        tokens = modulate(self.norm(tokens), shift, scale)
        out = unpatchify(self.out(tokens), rows, p)
        return out if self.refiner is None else out + self.refiner(x, tokens, condition)
