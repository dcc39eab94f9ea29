"""Configuration of the autoencoder stage."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from t2i.config import ModelConfig, check
from t2i.families.autoencoder.backbone_config import DVAEBackboneConfig, ViTBackboneConfig
from t2i.families.autoencoder.codec_config import CodecConfig, VQConfig
from t2i.families.autoencoder.model_config import EncoderDecoderConfig


@dataclass(frozen=True)
class LDMBackboneConfig(EncoderDecoderConfig):
    """The convolutional encoder and decoder of the latent diffusion paper; f = 2^(len(channel_mult) - 1)."""

    name: Literal["ldm"] = "ldm"


@dataclass(frozen=True)
class PatchBackboneConfig:
    """A small backbone that starts as the PCA of picture patches and learns a convolutional residual.

    patch_px: f, side of the patch that one latent position stands for
    latent_channels: C
    width, depth: channels and residual blocks of the encoder's and of the decoder's convolutional branch
    """

    name: Literal["patch"]
    patch_px: int = 4
    latent_channels: int = 16
    width: int = 64
    depth: int = 2

    def __post_init__(self) -> None:
        check(self.patch_px in (2, 4, 8, 16), "backbone.patch_px", self.patch_px, "2, 4, 8 or 16")
        most = 3 * self.patch_px**2
        check(
            1 <= self.latent_channels <= most,
            "backbone.latent_channels",
            self.latent_channels,
            f"1 to {most}",
        )
        check(self.depth >= 0, "backbone.depth", self.depth, "0 or more")
        check(self.width >= 32 and self.width % 32 == 0, "backbone.width", self.width, "a multiple of 32")


BackboneConfig = LDMBackboneConfig | PatchBackboneConfig | ViTBackboneConfig | DVAEBackboneConfig


@dataclass(frozen=True)
class DistanceConfig:
    """What a picture and its reconstruction are compared by, pixel by pixel.

    name: "l1": the mean absolute difference (2012.09841), or "l2": the mean square
    edge_weight: with l2: adds so many times the mean square of the error's differences between neighbouring pixels
    """

    name: Literal["l1", "l2"]
    edge_weight: float

    def __post_init__(self) -> None:
        ok = self.edge_weight == 0 or (self.name == "l2" and self.edge_weight > 0)
        check(ok, "distance.edge_weight", self.edge_weight, "0, or with distance=l2 more than that")


@dataclass(frozen=True)
class PerceptualConfig:
    """Distance between features of a frozen network.

    name: "lpips_vgg" (1801.03924; `weights` is a local vgg16 file), "efficientnet_lite0" (ImageNet features
        without learned heads; the weights come with a package) or "none"
    """

    name: Literal["lpips_vgg", "efficientnet_lite0", "none"]
    weight: float
    weights: str | None

    def __post_init__(self) -> None:
        if self.name == "none":
            check(self.weight == 0, "perceptual.weight", self.weight, "0 with perceptual.name=none")
            check(self.weights is None, "perceptual.weights", self.weights, "null with perceptual.name=none")
        check(self.weight >= 0, "perceptual.weight", self.weight, "0 or more")


@dataclass(frozen=True)
class AdversarialConfig:
    """The patch discriminator (1611.07004) and its part in the loss.

    weight: of the generator's term, before the adaptive weight of VQGAN (2012.09841, equation 7)
    adaptive: whether there is that weight
    loss: "hinge" or "vanilla" with -mean D(fake) for the generator, as VQGAN has them, or "non_saturating" (MaskGIT:
        2202.04200) for both sides
    start_images: pictures seen before the discriminator begins to learn and to count; null leaves it out
    r1_weight: gradient penalty on real pictures (1801.04406); 0 leaves it out
    """

    start_images: int | None
    weight: float
    loss: Literal["hinge", "vanilla", "non_saturating"]
    base_channels: int
    num_layers: int
    r1_weight: float
    adaptive: bool = True

    def __post_init__(self) -> None:
        ok = self.start_images is None or self.start_images >= 0
        check(ok, "adversarial.start_images", self.start_images, "0 or more, or null")
        for name in ("weight", "r1_weight"):
            check(getattr(self, name) >= 0, f"adversarial.{name}", getattr(self, name), "0 or more")
        for name in ("base_channels", "num_layers"):
            check(getattr(self, name) >= 1, f"adversarial.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True)
class UpsamplerConfig:
    """Convolutions that enlarge the decoder's pictures (Parti: 2206.10789, whose 12 blocks of 128 channels are the
    default: 15M parameters from 256 to 512 px).

    factor: of each side; 1: there is none
    channels, blocks: of its residual blocks
    """

    factor: int = 1
    channels: int = 128
    blocks: int = 12

    def __post_init__(self) -> None:
        check(self.factor in (1, 2, 4), "upsampler.factor", self.factor, "1, 2 or 4")
        for name in ("channels", "blocks"):
            check(getattr(self, name) >= 1, f"upsampler.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True)
class Config(ModelConfig):
    """What stage=autoencoder trains.

    vertical_flip: half of the training pictures are turned upside down: of few pictures an encoder learns more so
    trained: "all", or the "decoder" alone of the codec in init_from, whose codes or latents stay what they are (Muse:
        2301.00704, section 2.5); what was trained on these can be drawn with it. Or the "upsampler" alone, of a codec
        whose pictures have 1 / upsampler.factor of resolution.size_px
    """

    takes_muon: ClassVar[bool] = False
    codec: CodecConfig
    backbone: BackboneConfig
    perceptual: PerceptualConfig
    adversarial: AdversarialConfig
    # What a run had before there were these keys.
    distance: DistanceConfig = DistanceConfig("l1", edge_weight=0.0)
    vertical_flip: bool = False
    trained: Literal["all", "decoder", "upsampler"] = "all"
    upsampler: UpsamplerConfig = UpsamplerConfig()

    def __post_init__(self) -> None:
        laplace = isinstance(self.backbone, DVAEBackboneConfig)
        allowed = "l1 with backbone.name=dvae, which has its own in place of it"
        check(self.distance.name == "l1" or not laplace, "distance.name", self.distance.name, allowed)
        factor, enlarges = self.upsampler.factor, self.trained == "upsampler"
        allowed = "2 or 4 with trained=upsampler" if enlarges else f"1 with trained={self.trained}"
        check(enlarges == (factor > 1), "upsampler.factor", factor, allowed)
        allowed = "all or decoder with backbone.name=dvae, whose decoder gives no picture but a distribution"
        check(not (laplace and enlarges), "trained", self.trained, allowed)
        most = self.backbone.latent_channels
        if isinstance(self.codec, VQConfig) and self.codec.code_dim is not None:
            dim = self.codec.code_dim
            check(dim <= most, "codec.code_dim", dim, f"1 to {most}, backbone.latent_channels")

    def unused(self) -> dict[str, str]:
        found = super().unused()
        if self.adversarial.start_images is None:
            others = {f"adversarial.{f.name}" for f in fields(self.adversarial)} - {
                "adversarial.start_images"
            }
            found |= dict.fromkeys(others, "adversarial.start_images, which is null")
        if self.upsampler.factor == 1:
            found |= dict.fromkeys(("upsampler.channels", "upsampler.blocks"), "trained=upsampler")
        if isinstance(self.codec, VQConfig) and self.codec.entropy_weight == 0:
            found["codec.entropy_temperature"] = "codec.entropy_weight above 0"
        return found

    def check_resolution(self, size_px: int, key: str = "resolution.size_px") -> None:
        """Raises ConfigError, with this key, where pictures of this side do not divide into latent positions."""
        f = self.downsampling
        check(size_px % f == 0, key, size_px, f"multiples of {f}, the codec's downsampling")

    @property
    def downsampling(self) -> int:
        """Pixels per latent position along each side of the whole codec's pictures."""
        return downsampling(self.backbone) * self.upsampler.factor


def downsampling(backbone: BackboneConfig) -> int:
    """f: pixels per latent position along each side."""
    if isinstance(backbone, PatchBackboneConfig | ViTBackboneConfig):
        return backbone.patch_px
    return backbone.downsampling
