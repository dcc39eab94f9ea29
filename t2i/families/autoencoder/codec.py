"""The codecs: a backbone and what stands between its encoder and its decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2i.codes.fsq import FSQ
from t2i.codes.gumbel import GumbelCodes
from t2i.codes.lfq import LFQ
from t2i.codes.quantizer import Quantizer
from t2i.codes.vq import Codebook
from t2i.config import parse
from t2i.diffusion.objectives import difference_error
from t2i.families.autoencoder import dvae
from t2i.families.autoencoder.backbone_config import DVAEBackboneConfig
from t2i.families.autoencoder.backbones import build_backbone
from t2i.families.autoencoder.codec_config import DiscreteConfig, FSQConfig, GumbelConfig, KLConfig, LFQConfig
from t2i.families.autoencoder.config import BackboneConfig, Config, downsampling
from t2i.families.autoencoder.patch import PatchDecoder, PatchEncoder, initialise_from_pca
from t2i.families.autoencoder.posterior import DiagonalGaussian
from t2i.families.autoencoder.upsampler import Upsampler
from t2i.interfaces import ImageCodec, TokenCodec
from t2i.nn.precision import widened
from t2i.nn.resize import smaller
from t2i.training.randomness import Randomness


@dataclass
class Reconstruction:
    """image: (B, 3, H, W); distance: scalar, as `Codec.distance` gives it;
    regularizer: scalar, weighted and per picture value (KL) or per element (of a quantiser); metrics: further scalars
    to log."""

    image: Tensor
    distance: Tensor
    regularizer: Tensor
    metrics: dict[str, Tensor]


class Codec(ImageCodec):
    """What all codecs share: the backbone, the 1x1 convolutions around the bottleneck and the latent scale.

    encoder_channels, moment_channels, code_channels: see build_backbone
    logit_laplace: the decoder gives a distribution of the picture, as DALL-E's does
    upsampler: enlarges what the decoder gives; pictures are made as much smaller before they are encoded
    latent_scale: buffer, 1 / (standard deviation of all latents), measured when training ends (LDM paper,
    appendix G); `encode` multiplies by it and `decode` divides, so that diffusion sees about unit variance.
    """

    latent_scale: Tensor

    def __init__(
        self, config: Config, encoder_channels: int, moment_channels: int, code_channels: int
    ) -> None:
        super().__init__()
        backbone = config.backbone
        self.downsampling = config.downsampling
        self.latent_channels = self.code_channels = code_channels
        parts = build_backbone(backbone, encoder_channels, moment_channels, code_channels)
        self.encoder, self.quant_conv, self.post_quant_conv, self.decoder = parts
        self.logit_laplace = isinstance(backbone, DVAEBackboneConfig)
        self.distance_config = config.distance
        self.register_buffer("latent_scale", torch.ones(()))
        self.upsampler = None if config.upsampler.factor == 1 else Upsampler(config.upsampler)
        self.learning = config.trained

    def bottleneck(self) -> list[nn.Module]:
        """The modules from the picture to what the decoder is given."""
        return [self.encoder, self.quant_conv]

    def frozen(self) -> list[nn.Module]:
        """The modules that stay as they are, in training too."""
        if self.learning == "all":
            return []
        decoding = [self.post_quant_conv, self.decoder] if self.learning == "upsampler" else []
        return [*self.bottleneck(), *decoding]

    def freeze(self) -> None:
        """Lightning trains a module in the mode that it finds it in."""
        for module in self.frozen():
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Codec:
        super().train(mode)
        for module in self.frozen():
            module.eval()
        return self

    @property
    def last_layer(self) -> Tensor:
        """The last weight, where the adaptive GAN weight compares gradients."""
        last = self.decoder if self.upsampler is None else self.upsampler
        return last.last_layer  # type: ignore[return-value]

    def initialise(self, image: Tensor) -> None:
        """Sets what starts from data, given pictures (B, 3, H, W) in [-1, 1]: the patch backbone's PCA."""
        if isinstance(self.encoder, PatchEncoder) and isinstance(self.decoder, PatchDecoder):
            initialise_from_pca(self.encoder, self.decoder, image)

    @torch.no_grad()
    def measure_scale(self, images: Iterable[Tensor]) -> None:
        """Sets latent_scale from pictures (B, 3, H, W)."""
        self.latent_scale.fill_(1.0)
        latents = torch.cat([self.encode(image).flatten() for image in images])
        self.latent_scale.copy_(1.0 / latents.std().clamp_min(1e-6))

    def moments(self, image: Tensor) -> Tensor:
        if self.upsampler is not None:
            height, width = (side // self.upsampler.factor for side in image.shape[2:])
            image = smaller(image, (height, width))
        return self.quant_conv(self.encoder(image))

    def output(self, code: Tensor) -> Tensor:
        """(B, D, h, w) as the bottleneck gives it -> what is decoded from it, (B, 3 or 6, h*f, w*f)."""
        decoded = self.decoder(self.post_quant_conv(code))
        return decoded if self.upsampler is None else self.upsampler(decoded)

    def picture(self, output: Tensor) -> Tensor:
        """The decoder's output -> (B, 3, h*f, w*f), about [-1, 1]."""
        return dvae.picture(output) if self.logit_laplace else output

    def distance(self, output: Tensor, image: Tensor) -> Tensor:
        """Scalar: between the decoder's output and the picture (B, 3, H, W), per picture value."""
        if self.logit_laplace:
            return dvae.logit_laplace_loss(output, image)
        error = output - image
        if self.distance_config.name == "l1":
            return error.abs().mean()
        of_edges = difference_error(error).mean() if self.distance_config.edge_weight else 0.0
        return error.square().mean() + self.distance_config.edge_weight * of_edges

    def encoding_weights(self) -> dict[str, Tensor]:
        parts = (("encoder", self.encoder), ("quant_conv", self.quant_conv))
        found = {
            f"{part}.{name}": value for part, module in parts for name, value in module.state_dict().items()
        }
        if getattr(self.encoder, "unit_range", False):  # the same weights give other moments
            found["unit_range"] = self.latent_scale.new_ones(())
        return found

    def noise(self, random: Randomness, height_px: int, width_px: int) -> Tensor | None:
        """What `reconstruct` of a training batch of such pictures draws with, (B, ...); None where it draws nothing."""
        raise NotImplementedError

    def reconstruct(self, image: Tensor, noise: Tensor | None = None, images_seen: int = 0) -> Reconstruction:
        """(B, 3, H, W) in [-1, 1] -> through the bottleneck and back, with the bottleneck's loss.

        noise: as the method of that name gives it, or None to draw nothing
        images_seen: by the run, where the bottleneck changes with it
        """
        raise NotImplementedError


class KLCodec(Codec):
    """The KL-regularised autoencoder: encoder -> Gaussian posterior -> decoder."""

    def __init__(self, config: Config) -> None:
        channels = config.backbone.latent_channels
        super().__init__(config, 2 * channels, 2 * channels, channels)
        assert isinstance(config.codec, KLConfig)
        self.kl_weight = config.codec.kl_weight

    def posterior(self, image: Tensor) -> DiagonalGaussian:
        """(B, 3, H, W) -> q(z | image), unscaled."""
        return DiagonalGaussian(self.moments(image))

    def latent(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return DiagonalGaussian(moments).sample_with(noise) * self.latent_scale

    def decode(self, latent: Tensor) -> Tensor:
        return self.picture(self.output(latent / self.latent_scale))

    def noise(self, random: Randomness, height_px: int, width_px: int) -> Tensor | None:
        return random.normal("posterior", *self.latent_shape(height_px, width_px))

    def reconstruct(self, image: Tensor, noise: Tensor | None = None, images_seen: int = 0) -> Reconstruction:
        posterior = self.posterior(image)
        latent = posterior.sample_with(noise)
        # The LDM code adds sum(|x - y|) and kl_weight * kl; we take means over 3HW of both: the same ratio.
        kl = posterior.kl().mean() / image[0].numel()
        output = self.output(latent)
        distance = self.distance(output, image)
        return Reconstruction(self.picture(output), distance, self.kl_weight * kl, {"kl": kl.detach()})


class DiscreteCodec(Codec, TokenCodec):
    """An autoencoder with a quantiser. `encode` gives latents before quantisation, and `decode` quantises:
    the quantisation layer belongs to the decoder, as in the LDM paper's VQ-regularised models. `tokens` are the
    indices of the codes that `decode` takes."""

    def __init__(self, config: Config) -> None:
        assert not isinstance(config.codec, KLConfig)
        codebook, channels = build_quantizer(config.codec, config.backbone), config.backbone.latent_channels
        super().__init__(config, channels, codebook.in_channels, codebook.code_dim)
        self.num_codes, self.latent_channels = codebook.num_codes, codebook.in_channels
        self.codebook = codebook
        self.has_latents = not isinstance(codebook, GumbelCodes)

    def bottleneck(self) -> list[nn.Module]:
        return [*super().bottleneck(), self.codebook]

    def latent(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return widened(moments) * self.latent_scale

    def decode(self, latent: Tensor) -> Tensor:
        quantized = self.codebook(latent / self.latent_scale)
        return self.picture(self.output(quantized.latent))

    @torch.no_grad()
    def tokens(self, image: Tensor) -> Tensor:
        return self.codebook.indices(self.moments(image))

    def token_weights(self) -> dict[str, Tensor]:
        book = self.codebook
        codes = book.codes if isinstance(book, Codebook) else self.code_vectors()  # as stored, of any length
        return self.encoding_weights() | {"codes": codes.T[None, :, None]}

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        every = torch.arange(self.num_codes, device=self.latent_scale.device)
        return self.codebook.lookup(every[None, None])[0, :, 0].T

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        return self.picture(self.output(self.codebook.lookup(tokens)))

    def measure_scale(self, images: Iterable[Tensor]) -> None:
        if self.has_latents:
            super().measure_scale(images)

    def noise(self, random: Randomness, height_px: int, width_px: int) -> Tensor | None:
        if not self.codebook.needs_noise or self.learning != "all":
            return None
        return random.uniform("codes", *self.latent_shape(height_px, width_px))

    def reconstruct(self, image: Tensor, noise: Tensor | None = None, images_seen: int = 0) -> Reconstruction:
        quantized = self.codebook(self.moments(image), noise, images_seen)
        metrics = {
            "codebook_usage": quantized.usage,
            "codebook_perplexity": quantized.perplexity,
            **quantized.metrics,
        }
        output = self.output(quantized.latent)
        distance = self.distance(output, image)
        return Reconstruction(self.picture(output), distance, quantized.loss, metrics)


def build_quantizer(config: DiscreteConfig, backbone: BackboneConfig) -> Quantizer:
    """Codes have the backbone's number of channels where they have none of their own."""
    if isinstance(config, FSQConfig):
        return FSQ(config.levels)
    if isinstance(config, LFQConfig):
        return LFQ(
            config.num_codes, config.entropy_weight, config.entropy_temperature, config.commitment_weight
        )
    if isinstance(config, GumbelConfig):
        return GumbelCodes(
            config.num_codes,
            backbone.latent_channels,
            # The nats of all positions per value of the picture (2102.12092, appendix A.2: beta / 192 at f8).
            kl_weight=config.kl_weight / (3 * downsampling(backbone) ** 2),
            kl_warmup_images=config.kl_warmup_images,
            start_temperature=config.start_temperature,
            end_temperature=config.end_temperature,
            anneal_images=config.anneal_images,
        )
    return Codebook(
        config.num_codes,
        config.code_dim or backbone.latent_channels,
        ema_decay=config.ema_decay,
        commitment_weight=config.commitment_weight,
        restart_below=config.restart_below,
        normalize=config.normalize,
        entropy_weight=config.entropy_weight,
        entropy_temperature=config.entropy_temperature,
    )


def build_codec(config: Config) -> Codec:
    """The codec that `config.codec` names, randomly initialised."""
    return KLCodec(config) if isinstance(config.codec, KLConfig) else DiscreteCodec(config)


def from_checkpoint(values: Mapping[str, Any]) -> Codec:
    """The codec that a run's configuration (its plain top-level mapping) describes, randomly initialised."""
    names = {field.name for field in dataclasses.fields(Config)}
    return build_codec(parse(Config, {key: value for key, value in values.items() if key in names}))
