"""Configuration of autoregressive models over a codec's codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t2i.codes.config import CodeSampling
from t2i.config import ModelConfig, TextConfig, check
from t2i.families.builds_on import BuildsOn
from t2i.nn.transformer_config import TransformerConfig


@dataclass(frozen=True)
class NetworkConfig(TransformerConfig):
    """conditioning: text states come before the codes, or blocks attend to them ("cross")
    attention: of a code to those before it: all, or in turns those of DALL-E's patterns
    """

    conditioning: Literal["prefix", "cross"] = "prefix"
    attention: Literal["full", "axial"] = "full"


@dataclass(frozen=True)
class Config(ModelConfig):
    """What stage=ar and stage=parti train.

    builds_on: null where codes are the colours of a palette
    palette: of so many colours, made from the data when training begins; null with a codec
    """

    builds_on: BuildsOn | None
    transformer: NetworkConfig
    text: TextConfig
    sampling: CodeSampling
    palette: int | None = None

    def __post_init__(self) -> None:
        ok = self.palette is None or (self.palette >= 2 and self.builds_on is None)
        check(ok, "palette", self.palette, "2 or more with builds_on=null, or null")
        allowed = "a codec (builds_on.codec), or null with palette=COLOURS"
        check(self.builds_on is not None or self.palette is not None, "builds_on", None, allowed)

    def text_encoder(self) -> TextConfig:
        return self.text
