"""Configuration of latent diffusion conditioned on text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from t2i.config import ModelConfig, TextConfig, check
from t2i.diffusion.config import DiffusionSampling, Objective, ScheduleConfig, check_objective
from t2i.families.builds_on import BuildsOn
from t2i.families.latent_diffusion.unet_config import UNetConfig
from t2i.nn.dit_config import DiTConfig


@dataclass(frozen=True)
class PixArtConfig:
    """PixArt-alpha's diffusion transformer (2310.00426). Defaults are XL/2's at 256 px.

    patch_size: latent positions per token along each side
    width, depth, heads: of the transformer
    base_size, interpolation_scale: positions run from 0 to base_size / interpolation_scale along each side, whatever
        the resolution; published with base_size 16, 32 and 64 at 256, 512 and 1024 px, and scale 2 at 1024 px
    """

    name: Literal["pixart"]
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    base_size: int = 16
    interpolation_scale: float = 1.0

    def __post_init__(self) -> None:
        for key in ("patch_size", "depth", "heads", "base_size"):
            check(getattr(self, key) >= 1, f"denoiser.{key}", getattr(self, key), "1 or more")
        ok = self.width % self.heads == 0 and self.width % 4 == 0
        allowed = f"a multiple of heads ({self.heads}) and, for the position embedding, of 4"
        check(ok, "denoiser.width", self.width, allowed)
        ok = 0 < self.interpolation_scale < math.inf
        check(ok, "denoiser.interpolation_scale", self.interpolation_scale, "more than 0")


Masks = Literal["lama", "rectangles"]


@dataclass(frozen=True)
class UNetDenoiserConfig(UNetConfig):
    """The UNet. Its latent channels and context width are taken from the codec and the text encoder.

    masks: of a model for inpainting, which random masks it is trained with: "lama" (strokes and rectangles) or
        "rectangles"; it takes the mask and the latent of what the mask leaves beside the noisy latent. null: neither
    """

    name: Literal["unet"] = "unet"
    masks: Masks | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.masks is None or self.masks in get_args(Masks)
        check(ok, "denoiser.masks", self.masks, f"{', '.join(get_args(Masks))} or null")


@dataclass(frozen=True)
class ObjectiveConfig:
    """prediction: what the denoiser puts out
    min_snr_gamma: loss weighting of 2303.09556; null weighs all times alike"""

    prediction: Objective
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        ok = self.min_snr_gamma is None or 0 < self.min_snr_gamma < math.inf
        check(ok, "objective.min_snr_gamma", self.min_snr_gamma, "more than 0, or null")


@dataclass(frozen=True)
class Config(ModelConfig):
    """What stage=ldm trains.

    mask_padding: hides padding tokens from cross-attention; Stable Diffusion does not
    """

    builds_on: BuildsOn
    denoiser: DiTConfig | PixArtConfig | UNetDenoiserConfig
    schedule: ScheduleConfig
    objective: ObjectiveConfig
    text: TextConfig
    sampling: DiffusionSampling
    mask_padding: bool = True

    def __post_init__(self) -> None:
        check_objective(self.objective.prediction, self.schedule)

    @classmethod
    def upgraded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The codec's run was the entry `autoencoder` once."""
        if "builds_on" in values or "autoencoder" not in values:
            return dict(values)
        others = {key: value for key, value in values.items() if key != "autoencoder"}
        return others | {"builds_on": {"codec": values["autoencoder"]}}

    def text_encoder(self) -> TextConfig:
        return self.text

    def unused(self) -> dict[str, str]:
        return super().unused() | (self.denoiser.unused() if isinstance(self.denoiser, DiTConfig) else {})
