"""Text-conditioned latent diffusion: codec, text encoder, denoiser and noise schedule as one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i.config import check
from t2i.diffusion.config import DiffusionSampling
from t2i.diffusion.guidance import classifier_free
from t2i.diffusion.inpainting import coarse_mask, kept, pasted
from t2i.diffusion.inversion import invert
from t2i.diffusion.objectives import Prediction, loss_weight, target, to_x0_eps
from t2i.diffusion.sampler import Denoise
from t2i.diffusion.samplers import check_walk, sample
from t2i.diffusion.schedules import build_schedule
from t2i.families.codec import decoded, latent_codec
from t2i.families.latent_diffusion.config import (
    Config,
    PixArtConfig,
    UNetDenoiserConfig,
)
from t2i.families.latent_diffusion.masks import known_part
from t2i.families.latent_diffusion.pixart import PixArt
from t2i.families.latent_diffusion.unet import UNet
from t2i.interfaces import ImageCodec, Progress, SampleRequest, TextFeatures, TextToImage
from t2i.nn.between import asked_noise, asked_text
from t2i.nn.denoiser import Denoiser
from t2i.nn.dit import DiT
from t2i.nn.dit_config import DiTConfig
from t2i.nn.noise import draw_noise
from t2i.nn.precision import widened
from t2i.nn.tiling import check_tile, tiled
from t2i.text import text_encoder_for_training


class LatentDiffusion(TextToImage):
    """codec: an `nn.Module` that is a `t2i.interfaces.ImageCodec`, frozen here; its weights are part of the
    state dict, so that a checkpoint can be sampled from by itself. A frozen text encoder's weights are not: it
    is loaded from where the configuration says.
    """

    def __init__(self, config: Config, codec: ImageCodec) -> None:
        super().__init__()
        self.config = config
        self.codec = codec.eval().requires_grad_(False)
        self.schedule = build_schedule(config.schedule)
        self.text = text_encoder_for_training(config.text)
        self.denoiser = build_denoiser(
            config.denoiser, codec.latent_channels, self.text.token_dim, self.text.pooled_dim
        )

    def train(self, mode: bool = True) -> LatentDiffusion:
        super().train(mode)
        self.codec.eval()
        return self

    def check_size(self, height_px: int, width_px: int, keys: tuple[str, str]) -> None:
        """Raises ConfigError where pictures of this size cannot be made of whole latents and tokens."""
        for key, value in zip(keys, (height_px, width_px), strict=True):
            check_side(self.config.denoiser, self.codec, value, key)

    def check(self, request: SampleRequest, sampling: DiffusionSampling) -> None:
        """Raises ConfigError for sides that are no whole latents and tokens, seams that cannot be joined, and steps
        that there are not."""
        self.check_size(request.height_px, request.width_px, ("height", "width"))
        check_tile(request, self.denoiser)
        check_walk(request, sampling, self.schedule)

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser takes the known part of a picture."""
        config = self.config.denoiser
        return isinstance(config, UNetDenoiserConfig) and config.masks is not None

    def denoise(self, x: Tensor, t: Tensor, text: TextFeatures, known: Tensor | None = None) -> Tensor:
        """The denoiser's output for x_t (B, C, h, w) at times t (B,) of the schedule, in float32 at least: guidance and
        samplers work with that. known: of a model that inpaints, `known_part` (n, 1 + C, h, w), repeated where x is n
        pictures several times over"""
        if known is not None:
            x = torch.cat([x, known.repeat(len(x) // len(known), 1, 1, 1)], dim=1)
        mask = text.mask if self.config.mask_padding else None
        time = self.schedule.model_time(t).to(widened(x).dtype)
        return widened(self.denoiser.conditioned(x, time, text, mask))

    def loss(
        self, latent: Tensor, text: TextFeatures, t: Tensor, eps: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """(B,) weighted squared errors of the prediction (DDPM, algorithm 1; flow matching, 2210.02747).

        latent, eps: (B, C, h, w); t: (B,) times of the schedule; known: as `denoise` takes it
        """
        prediction = self.config.objective.prediction
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_t = self.schedule.add_noise(latent, eps, t)
        error = self.denoise(x_t, t, text, known) - target(prediction, latent, eps, alpha, sigma)
        weight = loss_weight(prediction, self.schedule.snr(t), self.config.objective.min_snr_gamma)
        return weight * error.square().flatten(1).mean(1)

    @torch.no_grad()
    def generate(
        self, request: SampleRequest, sampling: DiffusionSampling, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, 3, height_px, width_px) in [-1, 1], NaN where the model's numbers were not finite, on the model's
        device; see `t2i.interfaces.Generator`."""
        self.check(request, sampling)
        # All randomness of picture i comes from its own generator: a start picture's latent, the first noise, the
        # latent of what a mask leaves, where the model takes that, and what the sampler adds, in this order.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        shape = self.codec.latent_shape(request.height_px, request.width_px)
        init = constrain = known = None
        if request.image is not None and not (self.inpaints and request.strength == 1):
            image = request.image.to(self.device)
            init = self.codec.encode(image, draw_noise(generators, shape).to(image))
        noise = asked_noise(request, generators, shape).to(self.device)
        if self.inpaints:
            known = self.known(request, draw_noise(generators, shape))
        elif request.mask is not None:
            assert init is not None
            constrain = kept(init, noise, coarse_mask(request.mask.to(init), self.codec.downsampling))
        with tiled(request.tile, self.denoiser, self.codec):
            latent = sample(
                self.predictor(request, sampling, known),
                noise,
                self.schedule,
                sampling.sampler,
                sampling.steps,
                progress,
                grid=sampling,
                eta=sampling.eta,
                generators=generators,
                init=init,
                strength=request.strength,
                constrain=constrain,
            )
            drawn = decoded(self.codec, latent)
        drawn = drawn.clamp(-1, 1) + 0 * drawn  # NaN where it was not finite
        if request.mask is None or request.image is None:
            return drawn
        return pasted(drawn, request.image.to(drawn), request.mask.to(drawn))

    def known(self, request: SampleRequest, noise: Tensor | None = None) -> Tensor:
        """(N, 1 + C, h, w) of the request's picture and mask; without a mask nothing is known. noise: of the latent's
        posterior"""
        size = (len(request.prompts), 1, request.height_px, request.width_px)
        mask = torch.ones(size) if request.mask is None else request.mask
        image = torch.zeros(1, 3, *size[2:]) if request.image is None else request.image
        like = next(self.denoiser.parameters())
        mask, image = mask.to(like), image.to(like)
        latent = self.codec.encode(image * (1 - mask), None if noise is None else noise.to(like))
        return known_part(mask, latent)

    @torch.no_grad()
    def invert(
        self, request: SampleRequest, sampling: DiffusionSampling, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, C, h, w); see `t2i.interfaces.Generator`."""
        assert request.image is not None
        self.check(dataclasses.replace(request, strength=1.0), sampling)
        known = self.known(request) if self.inpaints else None
        model = self.predictor(request, dataclasses.replace(sampling, guidance_scale=1.0), known)
        latent = self.codec.encode(request.image.to(self.device))
        return invert(model, latent, self.schedule, sampling.steps, progress, sampling)

    def predictor(self, request: SampleRequest, sampling: DiffusionSampling, known: Tensor | None) -> Denoise:
        """(x_t, t) -> what the guided model predicts for the request."""
        text = asked_text(self.text, request)
        negative = self.text([request.negative_prompt] * len(request.prompts))

        def denoise(x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
            return self.denoise(x, t, text, known)

        model = classifier_free(denoise, text, negative, sampling, self.schedule)

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return to_x0_eps(self.config.objective.prediction, model(x, t), x, *self.schedule.alpha_sigma(t))

        return predict

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


def build_model(config: Config, codec_config: Mapping[str, Any]) -> LatentDiffusion:
    """The model with a randomly initialised codec of the family and shape that `codec_config` (the top-level
    mapping of the codec's run) says. Raises ConfigError for one without latents."""
    return LatentDiffusion(config, latent_codec(codec_config, config.builds_on.codec))


def check_side(
    config: DiTConfig | PixArtConfig | UNetDenoiserConfig, codec: ImageCodec, side_px: int, key: str
) -> None:
    """Raises ConfigError, with this key, where the denoiser cannot make a side of so many pixels of whole latents and
    tokens."""
    unit = codec.downsampling * latent_unit(config)
    check(side_px >= unit and side_px % unit == 0, key, side_px, f"multiples of {unit} with this model")


def latent_unit(config: DiTConfig | PixArtConfig | UNetDenoiserConfig) -> int:
    """Height and width of the latent must be multiples of this."""
    return config.downsampling if isinstance(config, UNetDenoiserConfig) else config.patch_size


def build_denoiser(
    config: DiTConfig | PixArtConfig | UNetDenoiserConfig, channels: int, context_dim: int, pooled_dim: int
) -> Denoiser:
    """The network that the configuration names, for a codec's channels and a text encoder's widths."""
    if isinstance(config, DiTConfig):
        return DiT(config, channels, context_dim, pooled_dim)
    if isinstance(config, PixArtConfig):
        return PixArt(config, channels, context_dim)
    # Beside the latent, a mask and the latent of what it leaves.
    taken = channels if config.masks is None else 2 * channels + 1
    fitted = dataclasses.replace(config, in_channels=taken, out_channels=channels, context_dim=context_dim)
    return UNet(fitted).to(memory_format=torch.channels_last)
