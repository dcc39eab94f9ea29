"""What every format of a model comes down to: a codec and, of a text-to-image model, a denoiser or a transformer of
codes, and a text encoder.

Configurations are plain mappings as config.yaml has them, weights are unread and carry our own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from t2i import families
from t2i.config import check
from t2i.errors import CheckpointError
from t2i.families.formats import Formats, Shapes
from t2i.interop.clip import ClipText
from t2i.interop.ldm_bert import LDMBertText
from t2i.interop.weights import Weights

Text = ClipText | LDMBertText

# What a codebook counts while it learns, and the codec's scale: no published file has these.
OWN_BUFFERS = ("latent_scale", "codebook.cluster_size", "codebook.cluster_sum", "codebook.steps")


@dataclass
class CodecPart:
    """config: the entries codec and backbone of a run
    weights: by our own names, without OWN_BUFFERS
    latent_scale: what latents are multiplied by to have about unit variance
    """

    config: dict[str, Any]
    weights: Weights
    latent_scale: float

    @property
    def quantised(self) -> bool:
        return self.config["codec"]["name"] == "vq"

    @property
    def is_dvae(self) -> bool:
        return self.config["backbone"]["name"] == "dvae"

    @property
    def is_vit(self) -> bool:
        return self.config["backbone"]["name"] == "vit"

    @property
    def kind(self) -> str:
        """For a person to read."""
        if self.is_dvae:
            return "discrete VAE (DALL-E)"
        return "VQ autoencoder" if self.quantised else "KL autoencoder"

    @property
    def downsampling(self) -> int:
        if self.is_dvae:
            return 8
        return 2 ** (len(self.config["backbone"]["channel_mult"]) - 1)


@dataclass
class DenoiserPart:
    """config: the entry denoiser of a run, a UNet
    weights: by our own names, which are CompVis'
    schedule: the entry of that name
    prediction: "eps", "x0" or "v"
    sampling: the entry of that name
    size_px: side of the pictures it was trained on
    """

    config: dict[str, Any]
    weights: Weights
    schedule: dict[str, Any]
    prediction: str
    sampling: dict[str, Any]
    size_px: int


@dataclass
class TransformerPart:
    """config: the entry transformer of a run, aMUSEd's
    weights: by our own names, which are diffusers'
    sampling: the entry of that name
    size_px: side of the pictures it was trained on
    """

    config: dict[str, Any]
    weights: Weights
    sampling: dict[str, Any]
    size_px: int


@dataclass
class Parts:
    """kind: what the source is, in words
    denoiser, transformer: one of them, or none of an autoencoder by itself
    text: None of an autoencoder by itself
    run: the configuration of the t2i run, where the source is one
    notes: sentences for the person who converts: what was assumed, and what was left out
    """

    kind: str
    codec: CodecPart
    denoiser: DenoiserPart | None = None
    transformer: TransformerPart | None = None
    text: Text | None = None
    run: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_codec(self) -> bool:
        """Whether it is an autoencoder by itself."""
        return self.denoiser is None and self.transformer is None

    @property
    def size_px(self) -> int:
        """Side of the pictures that it draws; of an autoencoder what is usual."""
        drawing = self.denoiser or self.transformer
        return 256 if drawing is None else drawing.size_px


def lacking(source: object, what: str, flag: str) -> CheckpointError:
    """The sentence for a source without a part that the command line can name."""
    return CheckpointError(f"{source} has no {what}; name one by {flag}.")


# What a UNet takes beside C latent channels, in models that are not drawn with.
UNSUPPORTED = {1: "a depth-to-image model (a depth map", 3: "a x4 upscaler (a picture of low resolution"}


def masks_of(channels: Any, latent: int, source: object) -> str | None:
    """The entry denoiser.masks of a UNet that takes so many channels: an inpainting model's is given a mask and a
    second latent. Raises CheckpointError that names what is not supported."""
    if isinstance(channels, int) and channels - latent in UNSUPPORTED:
        raise CheckpointError(
            f"{source} is {UNSUPPORTED[channels - latent]} beside the latent: {channels} channels), which is not "
            "supported; allowed: text-to-image and inpainting models."
        )
    return "lama" if channels == 2 * latent + 1 else None


def input_channels(config: Mapping[str, Any]) -> int:
    """What the UNet of an entry denoiser takes."""
    latent: int = config["out_channels"]
    return latent if config.get("masks") is None else 2 * latent + 1


def bounded(value: Any, key: str, most: int) -> int:
    """A whole number from 1 to `most`, so that no file can ask for a model of any size."""
    check(type(value) is int and 1 <= value <= most, key, value, f"a whole number from 1 to {most:,}")
    return value


def is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """Whether a file says one of these values. In Python true is 1 and false 0; in a file they are not."""
    return any(value == each and (type(value) is bool) == (type(each) is bool) for each in allowed)


def scale(value: Any, key: str) -> float:
    """What latents are multiplied by, as a file says it."""
    ok = type(value) in (int, float) and 0 < value < 1e6
    check(ok, key, value, "a number above 0")
    return value


def foreign_forms() -> dict[str, Formats]:
    """By name, those families whose models have foreign forms."""
    records = [families.get(name) for name in families.names()]
    return {record.name: record.load_formats() for record in records if record.formats is not None}


def formats_of(kind: Literal["codec", "text_to_image", "masked_codes"]) -> Formats:
    """Of the family that foreign models of this kind become: the first by name."""
    return next(formats for formats in foreign_forms().values() if formats.kind == kind)


def codec_shapes(config: Mapping[str, Any]) -> Shapes:
    """The weights by name of a codec with these entries, without OWN_BUFFERS. Raises ConfigError."""
    shapes = formats_of("codec").shapes(config)
    return {name: shape for name, shape in shapes.items() if name not in OWN_BUFFERS}


def denoiser_shapes(config: Mapping[str, Any], latent_channels: int, context_dim: int) -> Shapes:
    """The same of the UNet, for a codec's channels and a text encoder's width."""
    fitted = {"in_channels": latent_channels, "out_channels": latent_channels, "context_dim": context_dim}
    return formats_of("text_to_image").shapes({**config, **fitted})


def transformer_shapes(config: Mapping[str, Any], num_codes: int, text: ClipText) -> Shapes:
    """The same of aMUSEd's transformer."""
    sizes = {"num_codes": num_codes, "context_dim": text.token_dim, "pooled_dim": text.pooled_dim}
    return formats_of("masked_codes").shapes({"transformer": config, **sizes})
