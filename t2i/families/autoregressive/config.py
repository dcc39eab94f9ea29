"""Configuration of autoregressive models over a codec's codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t2i.codes.config import CodeSampling
from t2i.config import ModelConfig, TextConfig, check
from t2i.families.builds_on import CodesBuildsOn, LowConfig, check_low_is_there
from t2i.nn.transformer_config import TransformerConfig

PALETTE_PIXELS = 65_536  # that a palette is made of


@dataclass(frozen=True)
class NetworkConfig(TransformerConfig):
    """conditioning: text states come before the codes ("prefix"), blocks attend to them ("cross"), or the text is words
        in one stream with the codes, which are learned with these ("words")
    vocabulary: rows of the table of words
    attention: of a code to those before it: all, or in turns those of DALL-E's patterns
    """

    conditioning: Literal["prefix", "cross", "words"] = "prefix"
    attention: Literal["full", "axial"] = "full"
    vocabulary: int = 30_522


@dataclass(frozen=True)
class Config(ModelConfig):
    """What stage=ar and stage=parti train, and stage=ar_sr.

    builds_on: null where codes are the colours of a palette
    palette: of so many colours, made from the data when training begins; null with a codec
    low: of stage ar_sr; null for the others
    shift_px: training pictures are moved by up to so many pixels, so that one gives many codes
    """

    builds_on: CodesBuildsOn | None
    transformer: NetworkConfig
    text: TextConfig
    sampling: CodeSampling
    palette: int | None = None
    low: LowConfig | None = None
    shift_px: int = 0

    def __post_init__(self) -> None:
        ok = self.palette is None or (2 <= self.palette <= PALETTE_PIXELS and self.builds_on is None)
        check(ok, "palette", self.palette, f"2 to {PALETTE_PIXELS:,} with builds_on=null, or null")
        allowed = "a codec (builds_on.codec), or null with palette=COLOURS"
        check(self.builds_on is not None or self.palette is not None, "builds_on", None, allowed)
        place = None if self.builds_on is None else self.builds_on.low
        check_low_is_there(place, self.low, "ar or parti")
        words = self.transformer.conditioning == "words"
        allowed = "minilm with transformer.conditioning=words, whose tokenizer gives the words"
        check(not words or self.text.name == "minilm", "text.name", self.text.name, allowed)

    def text_encoder(self) -> TextConfig:
        return self.text

    def unused(self) -> dict[str, str]:
        words = self.transformer.conditioning == "words"
        without = {} if words else {"transformer.vocabulary": "transformer.conditioning=words"}
        return super().unused() | without
