"""Configuration of autoregressive models over a codec's codes."""

from __future__ import annotations

from dataclasses import dataclass

from t2i.codes.config import CodeSampling
from t2i.config import ModelConfig, TextConfig
from t2i.families.builds_on import BuildsOn
from t2i.nn.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Config(ModelConfig):
    """What stage=ar trains."""

    builds_on: BuildsOn
    transformer: TransformerConfig
    text: TextConfig
    sampling: CodeSampling

    def text_encoder(self) -> TextConfig:
        return self.text
