"""PixArt-alpha's diffusion transformer (2310.00426): adaLN-single, and cross-attention to T5's token states.

Same parameter names as diffusers' `PixArtTransformer2DModel`. It predicts no variance: published weights load with
those rows of `proj_out` left out (the second half of the channels, which are the fastest of each patch). The size
and aspect-ratio embeddings of the 1024 px model are not here.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn, randn

from t2i.families.latent_diffusion.config import PixArtConfig
from t2i.interfaces import TextFeatures
from t2i.nn.attention import Attention
from t2i.nn.denoiser import Denoiser
from t2i.nn.embeddings import sincos_2d, timestep_embedding
from t2i.nn.residual import zero_init

TIME_DIM = 256  # of the sinusoidal embedding
EPS = 1e-6


class TwoLayers(nn.Module):
    """(..., in_dim) -> (..., dim)."""

    def __init__(self, in_dim: int, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = _normal(nn.Linear(in_dim, dim))
        self.activation = activation
        self.linear_2 = _normal(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class AdaLNSingle(nn.Module):
    """One projection of the time for all blocks (section 2.3); each block adds a table of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TwoLayers(TIME_DIM, width, nn.SiLU())})
        self.linear = _normal(nn.Linear(width, 6 * width))

    def forward(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """t: (B,) -> (B, 6, width) shifts, scales and gates, and (B, width) the time, in the dtype of `like`."""
        time = self.emb["timestep_embedder"](timestep_embedding(t, TIME_DIM).to(like.dtype))
        return self.linear(nn.functional.silu(time)).unflatten(1, (6, -1)), time


class GELUProjection(nn.Module):
    """(..., dim) -> (..., hidden_dim), through the tanh form of GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """(B, N, dim) -> (B, N, dim), four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # diffusers has a dropout, here 0, between the two: the identity keeps its place in the names.
        self.net = nn.Sequential(GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PixArtBlock(nn.Module):
    """Self-attention and MLP under adaLN-single, with unmodulated cross-attention between (figure 4)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        head_dim = width // heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=EPS)
        self.attn1 = Attention(width, heads=heads, head_dim=head_dim, qkv_bias=True)
        self.attn2 = Attention(width, width, heads=heads, head_dim=head_dim, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=EPS)
        self.ff = FeedForward(width)
        self.scale_shift_table = nn.Parameter(randn(6, width) / width**0.5)
        self.apply(_xavier)
        zero_init(self.attn2.to_out)  # text joins as training asks for it

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        """x: (B, N, D); modulation: (B, 6, D); context: (B, L, D); context_mask: (B, L) bool -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).chunk(6, dim=1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.attn2(x, context, context_mask)
        return x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)


class PixArt(Denoiser):
    """Denoiser over latents (B, channels, h, w); h and w must be multiples of patch_size."""

    def __init__(self, config: PixArtConfig, channels: int, context_dim: int) -> None:
        super().__init__()
        self.config, width, p = config, config.width, config.patch_size
        self.pos_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, kernel_size=p, stride=p)})
        self.adaln_single = AdaLNSingle(width)
        self.caption_projection = TwoLayers(context_dim, width, nn.GELU("tanh"))
        self.transformer_blocks = nn.ModuleList(PixArtBlock(width, config.heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=EPS)
        self.scale_shift_table = nn.Parameter(randn(2, width) / width**0.5)
        self.proj_out = zero_init(nn.Linear(width, p * p * channels))

    def conditioned(self, x: Tensor, t: Tensor, text: TextFeatures, mask: Tensor | None) -> Tensor:
        return self(x, t, text.tokens, mask)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights between hidden layers, which Muon may step: those of attention and MLPs."""
        return [
            p
            for name, p in self.named_parameters()
            if name.startswith("transformer_blocks.") and name.endswith(".weight")
        ]

    def forward(self, x: Tensor, t: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """x: (B, C, h, w); t: (B,) in [0, 1000); context: (B, L, context_dim); context_mask: (B, L) bool, True
        where attended -> (B, C, h, w)."""
        p = self.config.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        span = self.config.base_size / self.config.interpolation_scale  # positions run from 0 to this
        position = sincos_2d(rows, columns, self.config.width, (rows / span, columns / span), x.device)
        tokens = self.pos_embed["proj"](x).flatten(2).transpose(1, 2) + position.to(x)
        modulation, time = self.adaln_single(t, x)
        text = self.caption_projection(context)
        for block in self.transformer_blocks:
            tokens = block(tokens, modulation, text, context_mask)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)
        tokens = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)


def _normal(layer: nn.Linear) -> nn.Linear:
    nn.init.normal_(layer.weight, std=0.02)
    return layer


def _xavier(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
