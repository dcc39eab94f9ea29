"""Features of captions: made ahead of training, and taken from a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from t2i.config import TextConfig
from t2i.interfaces import Batch, Feature, TextEncoder, TextFeatures
from t2i.text.cache import CachedTextEncoder

TENSORS = ("tokens", "pooled", "mask")  # of TextFeatures


def text_feature(text: TextEncoder, config: TextConfig) -> Mapping[str, Feature]:
    """What a stage's `features` says of its text encoder: "text", or nothing where it learns with the model."""
    if not isinstance(text, CachedTextEncoder):
        return {}
    encoder = text.encoder
    assert isinstance(encoder, nn.Module)

    def make(captions: Sequence[str]) -> Mapping[str, Tensor]:
        made: TextFeatures = encoder(captions)
        return {"tokens": made.tokens, "pooled": made.pooled, "mask": made.mask.to(torch.uint8)}

    feature = Feature(
        of="caption",
        tensors=TENSORS,
        make=make,
        module=encoder,
        weights=encoder.state_dict,
        settings=(type(encoder).__name__, encoder.max_tokens),
        made_by=" ".join(filter(None, (config.name, config.model, config.weights))),
    )
    return {"text": feature}


def text_of(batch: Batch, text: TextEncoder) -> TextFeatures:
    """Of the batch's captions: those computed ahead, or what `text` makes of them now."""
    if not batch.features.keys() >= set(TENSORS):
        return text(batch.caption)
    tokens, pooled, mask = (batch.features[name] for name in TENSORS)
    return TextFeatures(tokens, pooled, mask.bool())
