"""Configuration of masked modelling of codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t2i.codes.config import CodeSampling
from t2i.config import ModelConfig, TextConfig, check
from t2i.families.builds_on import CodesBuildsOn, LowConfig, check_low_is_there
from t2i.nn.transformer_config import TransformerConfig
from t2i.schema import check_number, check_scale


@dataclass(frozen=True)
class MaskGITConfig:
    """MaskGIT's transformer, BERT's (2202.04200; defaults are ImageNet's), with the caption's token states before the
    codes.

    width, depth, heads: the MLPs are four times as wide
    dropout: of embeddings, attention and what each branch adds
    """

    name: Literal["maskgit"]
    width: int = 768
    depth: int = 24
    heads: int = 16
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads"):
            check(getattr(self, key) >= 1, f"transformer.{key}", getattr(self, key), "1 or more")
        whole = self.width % self.heads == 0
        check(whole, "transformer.width", self.width, f"a multiple of heads ({self.heads})")
        check(0 <= self.dropout < 1, "transformer.dropout", self.dropout, "0 up to, not including, 1")


@dataclass(frozen=True)
class MuseConfig(TransformerConfig):
    """Muse's transformer (2301.00704): codes attend to one another and to the caption's token states."""

    name: Literal["muse"] = "muse"


@dataclass(frozen=True)
class UVitConfig:
    """aMUSEd's U-ViT (2401.01808). Defaults are those of the published 256 px model; that for 512 px has downsample.

    width, depth, heads, hidden: of the transformer; hidden: of its gated MLPs
    channels, conv_blocks, conv_heads: of the convolutional blocks before and after it, so many on each side
    embedding_dim: of a code, on the way in and out
    downsample: the transformer works at half the resolution
    vocabulary: rows of the table of codes, of which the last is the mask's (published: 8256 for 8192 codes); null: no
        row is unused
    """

    name: Literal["uvit"]
    width: int = 1024
    depth: int = 22
    heads: int = 16
    hidden: int = 2816
    channels: int = 768
    conv_blocks: int = 3
    conv_heads: int = 12
    embedding_dim: int = 768
    downsample: bool = False
    dropout: float = 0.0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for key in (
            "width",
            "depth",
            "heads",
            "hidden",
            "channels",
            "conv_blocks",
            "conv_heads",
            "embedding_dim",
        ):
            check(getattr(self, key) >= 1, f"transformer.{key}", getattr(self, key), "1 or more")
        for key, heads in (("width", self.heads), ("channels", self.conv_heads)):
            value = getattr(self, key)
            check(value % heads == 0, f"transformer.{key}", value, f"a multiple of its heads ({heads})")
        check(0 <= self.dropout < 1, "transformer.dropout", self.dropout, "0 up to, not including, 1")


@dataclass(frozen=True)
class MaskedLowConfig(LowConfig):
    """depth: blocks in which the codes attend to one another before they stand beside the caption's token states"""

    depth: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.depth >= 0, "low.depth", self.depth, "0 or more")


@dataclass(frozen=True)
class SamplingConfig(CodeSampling):
    """How codes are drawn; see `t2i.codes.masked.decode`.

    steps: calls of the transformer, each for all codes at once
    guidance_schedule: "linear" lets guidance grow from 1 at the first step to guidance_scale at the last (2301.00704,
        section 2.7)
    choice_temperature: of the noise on the confidence that decides which codes are kept, falling to 0 over the steps
    order: which codes are kept first: those of which the model is most "confident", or the places of "halton"'s
        sequence (2503.17076)
    noise_per: random numbers for each position, or for each of its codes, as AmusedPipeline draws them: of one picture
        it draws the same for the same seed
    """

    steps: int
    guidance_schedule: Literal["constant", "linear"]
    choice_temperature: float
    order: Literal["confidence", "halton"]
    noise_per: Literal["position", "code"] = "position"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sampling.steps", self.steps)
        check_scale("sampling.choice_temperature", self.choice_temperature)


@dataclass(frozen=True)
class Config(ModelConfig):
    """What stage=masked trains, and stage=masked_sr.

    label_smoothing: share of the target that all codes have alike
    low: of stage masked_sr; null for masked
    shift_px: training pictures are moved by up to so many pixels, so that one gives many codes
    """

    builds_on: CodesBuildsOn
    transformer: MuseConfig | MaskGITConfig | UVitConfig
    text: TextConfig
    sampling: SamplingConfig
    label_smoothing: float
    low: MaskedLowConfig | None = None
    shift_px: int = 0

    def __post_init__(self) -> None:
        check(
            0 <= self.label_smoothing < 1,
            "label_smoothing",
            self.label_smoothing,
            "0 up to, not including, 1",
        )
        check_low_is_there(self.builds_on.low, self.low, "masked")
        ok = self.low is None or isinstance(self.transformer, MuseConfig)
        check(ok, "transformer.name", self.transformer.name, "muse with stage masked_sr")

    def text_encoder(self) -> TextConfig:
        return self.text
