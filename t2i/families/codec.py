"""What a family builds on: the codec of another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i import families
from t2i.errors import ConfigError
from t2i.interfaces import ImageCodec, TokenCodec


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
