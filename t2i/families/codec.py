"""What a family builds on: the codec of another run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from t2i import families
from t2i.errors import ConfigError
from t2i.interfaces import ImageCodec, TokenCodec

# Pixels that are decoded at a time: a GPU wants more to be busy.
SLICE_PX, CPU_SLICE_PX = 512 * 512, 128 * 128


def decoded(codec: ImageCodec, latents: Tensor) -> Tensor:
    """As codec.decode gives it, (B, C, h, w) -> (B, 3, h*f, w*f), in slices of at most so many pixels as above, or one
    picture: what is computed on the way does not take more memory for a larger batch."""
    return _in_slices(codec.decode, latents, codec.downsampling)


def decoded_tokens(codec: TokenCodec, tokens: Tensor) -> Tensor:
    """The same of codec.decode_tokens, (B, h, w) int64 -> (B, 3, h*f, w*f)."""
    return _in_slices(codec.decode_tokens, tokens, codec.downsampling)


def _in_slices(decode: Callable[[Tensor], Tensor], values: Tensor, downsampling: int) -> Tensor:
    pixels = values.shape[-2] * values.shape[-1] * downsampling**2
    slice_px = CPU_SLICE_PX if values.device.type == "cpu" else SLICE_PX
    parts = values.split(max(1, slice_px // pixels))
    first = decode(parts[0])
    if len(parts) == 1:
        return first
    images = first.new_empty(len(values), *first.shape[1:])
    start = 0
    for part in parts:
        images[start : start + len(part)] = decode(part) if start else first
        start += len(part)
    return images


def image_codec(values: Mapping[str, Any]) -> ImageCodec:
    """The codec, randomly initialised, of the run whose configuration is `values` (its top-level mapping)."""
    return families.get(values["family"]).load_codec()(values)


def token_codec(values: Mapping[str, Any], place: str) -> TokenCodec:
    """The same for a family of tokens. Raises ConfigError where the run's codec gives none.

    place: the run's, as builds_on.codec names it
    """
    codec = image_codec(values)
    if not isinstance(codec, TokenCodec):
        raise ConfigError(
            f"builds_on.codec is {place!r}, whose {type(codec).__name__} gives no tokens; allowed: a run whose codec "
            "has a codebook."
        )
    return codec


def latent_codec(values: Mapping[str, Any], place: str) -> ImageCodec:
    """The same for a family of latents. Raises ConfigError where the run's codec gives none."""
    codec = image_codec(values)
    if not codec.has_latents:
        raise ConfigError(
            f"builds_on.codec is {place!r}, whose encoder gives logits of codes and no latents; allowed: a run with "
            "codec=kl, vq, lfq or fsq."
        )
    return codec
