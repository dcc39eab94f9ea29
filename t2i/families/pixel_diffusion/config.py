"""Configuration of pixel diffusion conditioned on text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from t2i.config import ModelConfig, TextConfig, check
from t2i.diffusion.config import DiffusionSampling, Objective, ScheduleConfig, check_objective
from t2i.families.pixel_diffusion.unet_config import UNetConfig
from t2i.nn.dit_config import DiTConfig
from t2i.schema import check_scale

Variance = Literal["fixed_small", "fixed_large", "learned"]


@dataclass(frozen=True)
class ClassifierConfig:
    """The network that tells from a noisy picture how well a caption fits: ADM's classifier with a caption in place of
    a class, trained as GLIDE's noised CLIP is (2112.10741, section 2.4).

    encoder: the picture's side, half a UNet
    embed_dim: width in which picture and caption are compared
    """

    encoder: UNetConfig
    embed_dim: int

    def __post_init__(self) -> None:
        check(self.embed_dim >= 1, "classifier.embed_dim", self.embed_dim, "1 or more")


@dataclass(frozen=True)
class ObjectiveConfig:
    """prediction: what the network says of the picture
    min_snr_gamma: loss weighting of 2303.09556; null weighs all times alike
    max_snr: prediction x0 only: weighs its error by the signal-to-noise ratio, but at least 1 (2202.00512, section 4:
        "truncated SNR") and at most this; null weighs all times alike
    edge_weight: prediction x0 only: adds to its squared error so many times that of the differences between
        neighbouring pixels, so that outlines count as much as what surrounds them; 0 adds none"""

    prediction: Objective
    min_snr_gamma: float | None
    max_snr: float | None = None
    edge_weight: float = 0.0

    def __post_init__(self) -> None:
        ok = self.min_snr_gamma is None or 0 < self.min_snr_gamma < math.inf
        check(ok, "objective.min_snr_gamma", self.min_snr_gamma, "more than 0, or null")
        ok = self.max_snr is None or 1 <= self.max_snr < math.inf
        check(ok, "objective.max_snr", self.max_snr, "1 or more, or null")
        alone = self.prediction == "x0" and self.min_snr_gamma is None
        allowed = "null but for prediction x0 without min_snr_gamma"
        check(self.max_snr is None or alone, "objective.max_snr", self.max_snr, allowed)
        allowed = "0 or more with prediction x0, else 0"
        ok = self.edge_weight == 0 or (self.prediction == "x0" and 0 < self.edge_weight < math.inf)
        check(ok, "objective.edge_weight", self.edge_weight, allowed)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(DiffusionSampling):
    """How pictures are drawn while training, and what `t2i sample` does where nothing else is said.

    clip_x0: brings each prediction of the picture to [-1, 1], as DDPM and ADM do
    threshold_percentile: dynamic thresholding (2205.11487, section 2.3): where of a predicted picture's values this
        share (0.995) lies within more than 1, larger ones are cut to that and all are divided by it; null for none
    classifier_scale: of classifier guidance (2105.05233, algorithm 2); 0 for none, and where no classifier was trained
    """

    clip_x0: bool
    classifier_scale: float
    threshold_percentile: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("sampling.classifier_scale", self.classifier_scale)
        share = self.threshold_percentile
        ok = share is None or (0 < share <= 1 and not self.clip_x0)
        allowed = "above 0 to 1 with sampling.clip_x0=false, or null"
        check(ok, "sampling.threshold_percentile", share, allowed)


@dataclass(frozen=True)
class Config(ModelConfig):
    """What stage=pixel_diffusion trains.

    variance: of the steps of sampler ddpm: the posterior's ("fixed_small"), that of the step forward ("fixed_large"),
        or between them as the network says ("learned", trained by the hybrid loss of 2102.09672)
    text_width: width to which the caption's tokens are brought before the UNet's attention sees them
    classifier: for classifier guidance, trained beside the denoiser; null for none
    """

    denoiser: UNetConfig | DiTConfig
    text_width: int
    schedule: ScheduleConfig
    objective: ObjectiveConfig
    variance: Variance
    text: TextConfig
    sampling: SamplingConfig
    classifier: ClassifierConfig | None

    def __post_init__(self) -> None:
        check(self.text_width >= 1, "text_width", self.text_width, "1 or more")
        check_objective(self.objective.prediction, self.schedule)
        ok = self.variance == "fixed_small" or self.schedule.name != "flow"
        check(ok, "variance", self.variance, "fixed_small with schedule.name=flow")
        ok = self.variance != "learned" or isinstance(self.denoiser, UNetConfig)
        check(ok, "variance", self.variance, "fixed_small or fixed_large with denoiser.name=dit")
        ok = self.classifier is not None or self.sampling.classifier_scale == 0
        allowed = "0 where no classifier is trained (classifier: null)"
        check(ok, "sampling.classifier_scale", self.sampling.classifier_scale, allowed)

    @classmethod
    def upgraded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The UNet was the only denoiser once, and had no name."""
        denoiser = values.get("denoiser")
        if not isinstance(denoiser, Mapping) or "name" in denoiser:
            return dict(values)
        return dict(values) | {"denoiser": {"name": "adm", **denoiser}}

    def text_encoder(self) -> TextConfig:
        return self.text

    def unused(self) -> dict[str, str]:
        if isinstance(self.denoiser, UNetConfig):
            return super().unused()
        return super().unused() | {"text_width": "a UNet (denoiser.name=adm)"} | self.denoiser.unused()
