"""A diffusion transformer with cross-attention to text (DiT, 2212.09748; PixArt-alpha, 2310.00426)."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from t2i.families.latent_diffusion.config import DiTConfig
from t2i.nn.attention import Attention
from t2i.nn.embeddings import sincos_2d, timestep_embedding

POSITION_SPAN = 16.0  # positions run from 0 to this along the longer side, whatever the resolution


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, D) by (B, D): adaptive layer norm's affine part."""
    return x * (1 + scale[:, None]) + shift[:, None]


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
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        """x: (B, N, D); condition: (B, D) time and pooled text; context: (B, L, D); context_mask: (B, L)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross_attention(self.norm2(x), context, context_mask)
        return x + gate2[:, None] * self.mlp(modulate(self.norm3(x), shift2, scale2))


class DiT(nn.Module):
    """Denoiser over latents (B, channels, h, w); h and w must be multiples of patch_size."""

    def __init__(self, config: DiTConfig, channels: int, context_dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.patch_size, width = config.patch_size, config.width
        patch_dim = channels * config.patch_size**2
        self.embed = nn.Linear(patch_dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled = nn.Sequential(nn.LayerNorm(pooled_dim), nn.Linear(pooled_dim, width))
        self.context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, width))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch_dim)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, context_mask: Tensor | None = None
    ) -> Tensor:
        """x: (B, C, h, w); t: (B,) in [0, 1000); context: (B, L, context_dim); pooled: (B, pooled_dim);
        context_mask: (B, L) bool, True where attended -> (B, C, h, w)."""
        p = self.patch_size
        rows, columns = x.shape[2] // p, x.shape[3] // p
        position = sincos_2d(rows, columns, self.embed.out_features, scale=max(rows, columns) / POSITION_SPAN)
        tokens = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)) + position.to(x)
        time = timestep_embedding(t, self.embed.out_features).to(x.dtype)
        condition = nn.functional.silu(self.time(time) + self.pooled(pooled))
        text = self.context(context)
        for block in self.blocks:
            tokens = block(tokens, condition, text, context_mask)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        out = self.out(modulate(self.norm(tokens), shift, scale))
        return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)
