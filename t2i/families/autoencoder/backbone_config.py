"""Configuration of the transformers of ViT-VQGAN and of DALL-E's networks; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t2i.config import check


@dataclass(frozen=True)
class ViTConfig:
    """A plain transformer: the MLP of a block is 4 * width wide.

    width: a multiple of 4
    head_dim: width of a head; the heads together may be narrower or wider than width
    activation: of the MLPs; "tanh" as the published weights of enhancing-transformers have it
    """

    width: int
    depth: int
    num_heads: int
    head_dim: int = 64
    activation: Literal["gelu", "tanh"] = "gelu"


@dataclass(frozen=True)
class ViTBackboneConfig:
    """The transformers of ViT-VQGAN (2110.04627, table 1) over patches.

    patch_px: f, side of the patch that one latent position stands for
    resolution_px: side of the training pictures, for which positions are learned
    latent_channels: C, to which a linear layer brings the encoder's width down (section 3.2, factorised codes)
    unit_range: within the networks pictures are in [0, 1], as those of enhancing-transformers are, and not in [-1, 1]
    """

    name: Literal["vit"]
    patch_px: int
    resolution_px: int
    latent_channels: int
    encoder: ViTConfig
    decoder: ViTConfig
    unit_range: bool = False

    def __post_init__(self) -> None:
        check(self.patch_px >= 1, "backbone.patch_px", self.patch_px, "1 or more")
        f = self.patch_px
        ok = self.resolution_px >= f and self.resolution_px % f == 0
        check(ok, "backbone.resolution_px", self.resolution_px, f"a multiple of backbone.patch_px ({f})")
        check(self.latent_channels >= 1, "backbone.latent_channels", self.latent_channels, "1 or more")
        for part, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            key = f"backbone.{part}"
            check(stack.width >= 4 and stack.width % 4 == 0, f"{key}.width", stack.width, "a multiple of 4")
            for name in ("depth", "num_heads", "head_dim"):
                check(getattr(stack, name) >= 1, f"{key}.{name}", getattr(stack, name), "1 or more")


@dataclass(frozen=True)
class DVAEBackboneConfig:
    """The networks of DALL-E's discrete VAE (2102.12092, appendix A.2), f8.

    width: of the convolutions at full resolution, a multiple of 4
    blocks_per_group: residual blocks at each of the four resolutions
    latent_channels: C, which the decoder begins with
    """

    name: Literal["dvae"]
    width: int
    blocks_per_group: int
    latent_channels: int

    def __post_init__(self) -> None:
        check(self.width >= 4 and self.width % 4 == 0, "backbone.width", self.width, "a multiple of 4")
        for name in ("blocks_per_group", "latent_channels"):
            check(getattr(self, name) >= 1, f"backbone.{name}", getattr(self, name), "1 or more")

    @property
    def downsampling(self) -> int:
        """Pixels of the picture per latent position along each side."""
        return 8

    @property
    def encoder_channels(self) -> int:
        """That the last convolution, which gives the codes' logits, begins with."""
        return 8 * self.width
