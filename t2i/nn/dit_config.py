"""Shape of the diffusion transformer. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t2i.config import check


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer (2212.09748) with cross-attention to text tokens.

    patch_size: positions of the latent, or pixels, per token along each side
    width, depth, heads: of the transformer
    refiner_width, refiner_depth: channels and blocks of the convolutions after it; depth 0 for the paper's DiT
    refiner_patch_size: squares of so many positions along each side become channels for these convolutions
    """

    name: Literal["dit"]
    patch_size: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    # What a run had before there were these keys.
    refiner_width: int = 48
    refiner_depth: int = 0
    refiner_patch_size: int = 1

    def __post_init__(self) -> None:
        for key in ("patch_size", "depth", "heads", "mlp_ratio", "refiner_width", "refiner_patch_size"):
            check(getattr(self, key) >= 1, f"denoiser.{key}", getattr(self, key), "1 or more")
        whole = self.patch_size % self.refiner_patch_size == 0
        allowed = f"a divisor of patch_size ({self.patch_size})"
        check(whole, "denoiser.refiner_patch_size", self.refiner_patch_size, allowed)
        check(self.refiner_depth >= 0, "denoiser.refiner_depth", self.refiner_depth, "0 or more")
        check(
            self.width % self.heads == 0, "denoiser.width", self.width, f"a multiple of heads ({self.heads})"
        )
        check(
            self.width % 4 == 0, "denoiser.width", self.width, "a multiple of 4, for the position embedding"
        )

    def unused(self) -> dict[str, str]:
        """See `t2i.config.ModelConfig`."""
        keys = ("denoiser.refiner_width", "denoiser.refiner_patch_size")
        return {} if self.refiner_depth else dict.fromkeys(keys, "denoiser.refiner_depth above 0")
