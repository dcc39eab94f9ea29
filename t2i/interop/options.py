"""What a person says of a conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["t2i", "diffusers", "compvis"]


@dataclass(frozen=True)
class Options:
    """to: None takes t2i for a foreign source and, for one of ours, what the name of OUT says
    dtype: a name in DTYPES
    ema: take averaged weights where there are any
    prediction: what the UNet of a single file predicts, which the file itself does not say
    text_model, vae: the text encoder and the autoencoder, in the place of the source's own or where it has none
    """

    to: Format | None = None
    dtype: str = "fp32"
    ema: bool = True
    prediction: Literal["eps", "v"] | None = None
    text_model: str | None = None
    vae: str | None = None
