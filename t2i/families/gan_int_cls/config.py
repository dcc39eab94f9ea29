"""Configuration of GAN-INT-CLS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from t2i.config import TRAINED_ENCODERS, ModelConfig, TextConfig, check
from t2i.schema import check_scale


@dataclass(frozen=True)
class GeneratorConfig:
    """noise_dim: of z ~ N(0, I)
    text_dim: the caption's vector is projected to this width
    base_channels: at half the picture's size; each halving of the size doubles them
    normalise_text: batch norm on the projected caption, which the paper's code has in the discriminator alone
    """

    noise_dim: int
    text_dim: int
    base_channels: int
    normalise_text: bool

    def __post_init__(self) -> None:
        for key in ("noise_dim", "text_dim", "base_channels"):
            check(getattr(self, key) >= 1, f"generator.{key}", getattr(self, key), "1 or more")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """text_dim: the caption's vector is projected to this width
    base_channels: at half the picture's size; each halving of the size doubles them
    norm: of the convolutions; a gradient penalty wants none, as batch norm ties the pictures of a batch together
    head: what joins picture and caption at 4x4 positions: the paper's concatenation, or a projection (1802.05637)
        with a weight for each position
    """

    text_dim: int
    base_channels: int
    norm: Literal["batch", "none"]
    head: Literal["concat", "projection"]

    def __post_init__(self) -> None:
        for key in ("text_dim", "base_channels"):
            check(getattr(self, key) >= 1, f"discriminator.{key}", getattr(self, key), "1 or more")


@dataclass(frozen=True)
class SamplingConfig:
    """noise_scale: standard deviation of the noise; 1 is what was trained, less gives more typical pictures"""

    noise_scale: float

    def __post_init__(self) -> None:
        check_scale("sampling.noise_scale", self.noise_scale)


@dataclass(frozen=True)
class Config(ModelConfig):
    """What stage=gan_int_cls trains.

    text: a frozen encoder, of which the pooled vector is used
    wrong_weight: share of the pairs of a real picture and a wrong caption in the discriminator's loss, the rest
        is the generated pictures'; 0 is the plain GAN without CLS
    interpolation_weight: of captions between two captions in the generator's loss; 0 is without INT
    r1_weight, r1_every: gamma of the gradient penalty on real pictures (1801.04406), and every how many steps
        it is computed, with so many times the weight (1912.04958); weight 0 is without
    """

    takes_muon: ClassVar[bool] = False
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    text: TextConfig
    sampling: SamplingConfig
    wrong_weight: float
    interpolation_weight: float
    r1_weight: float
    r1_every: int

    def __post_init__(self) -> None:
        trained = self.text.name in TRAINED_ENCODERS
        check(not trained, "text.name", self.text.name, "frozen encoders: clip, open_clip, t5, minilm")
        check(0 <= self.wrong_weight < 1, "wrong_weight", self.wrong_weight, "0 up to, not including, 1")
        for key in ("interpolation_weight", "r1_weight"):
            ok = 0 <= getattr(self, key) < math.inf
            check(ok, key, getattr(self, key), "0 or more")
        check(self.r1_every >= 1, "r1_every", self.r1_every, "1 or more")
        normed = self.r1_weight > 0 and self.discriminator.norm == "batch"
        check(not normed, "r1_weight", self.r1_weight, "0 with discriminator.norm=batch")

    @classmethod
    def upgraded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The step decay of the learning rates was an entry of its own once."""
        found = dict(values)
        if (every := found.pop("halve_every_images", None)) is not None:
            optimizer = dict(found["optimizer"])
            schedule = "step" if optimizer.get("schedule") == "constant" else optimizer.get("schedule")
            found["optimizer"] = optimizer | {"schedule": schedule, "halve_every_images": every}
        return found

    def text_encoder(self) -> TextConfig:
        return self.text

    def unused(self) -> dict[str, str]:
        return super().unused() | ({} if self.r1_weight > 0 else {"r1_every": "r1_weight above 0"})
