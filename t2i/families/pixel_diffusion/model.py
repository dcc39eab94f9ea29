"""Text-conditioned pixel diffusion: text encoder, denoiser, noise schedule and classifier as one model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from t2i.config import check
from t2i.diffusion.guidance import classifier_free, thresholded
from t2i.diffusion.inpainting import kept
from t2i.diffusion.inversion import invert
from t2i.diffusion.objectives import Prediction, difference_error, loss_weight, target, to_x0_eps
from t2i.diffusion.samplers import check_walk, sample
from t2i.diffusion.schedules import DiscreteSchedule, build_schedule, per_sample
from t2i.diffusion.variance import ReverseSteps
from t2i.families.pixel_diffusion.classifier import NoisyMatcher, towards
from t2i.families.pixel_diffusion.config import Config, SamplingConfig
from t2i.families.pixel_diffusion.unet import UNet
from t2i.families.pixel_diffusion.unet_config import UNetConfig
from t2i.interfaces import Progress, SampleRequest, TextFeatures, TextToImage
from t2i.nn.between import asked_noise, asked_text
from t2i.nn.dit import DiT
from t2i.nn.dit_config import DiTConfig
from t2i.nn.once import once
from t2i.nn.precision import widened
from t2i.nn.tiling import check_tile, tiled
from t2i.text import text_encoder_for_training

CHANNELS = 3


class PixelDiffusion(TextToImage):
    """size_px: height and width of the pictures that it is trained on.

    A frozen text encoder's weights are not among the model's: it is loaded from where the configuration says.
    """

    def __init__(self, config: Config, size_px: int) -> None:
        super().__init__()
        self.config = config
        self.schedule = build_schedule(config.schedule)
        self.text = text_encoder_for_training(config.text)
        self.denoiser = build_denoiser(config, self.text.token_dim, self.text.pooled_dim)
        self.classifier = build_classifier(config, size_px, self.text.token_dim)
        self.steps: ReverseSteps | None = None
        if config.variance == "learned":
            assert isinstance(self.schedule, DiscreteSchedule)  # the configuration was checked
            self.steps = ReverseSteps(self.schedule)

    def model_time(self, x: Tensor, t: Tensor) -> Tensor:
        return self.schedule.model_time(t).to(widened(x).dtype)

    def denoise(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """The denoiser's output for x_t (B, 3, H, W) at times t (B,) of the schedule: (B, 3, H, W), or (B, 6, H, W)
        with the variance after the prediction; in float32 at least, as guidance and samplers want it."""
        return widened(self.denoiser(x, self.model_time(x, t), text.tokens, text.pooled, text.mask))

    def losses(self, image: Tensor, text: TextFeatures, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """(B,) each: "loss", and what it is made of where it has parts: the weighted squared error "mse" (2006.11239,
        eq. 14; with edge_weight, that of differences is part of it) and, of a learned variance, "bits" per number of
        the variational bound. Their sum is the hybrid loss of 2102.09672, eq. 16, in which the bound trains the
        variance alone.

        image, eps: (B, 3, H, W); t: (B,) times of the schedule
        """
        objective = self.config.objective
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_t = self.schedule.add_noise(image, eps, t)
        output = self.denoise(x_t, t, text)
        prediction = output[:, :CHANNELS]
        error = prediction - target(objective.prediction, image, eps, alpha, sigma)
        snr = self.schedule.snr(t)
        weight = loss_weight(objective.prediction, snr, objective.min_snr_gamma)
        if objective.max_snr is not None:
            weight = snr.clamp(1, objective.max_snr)
        mse = error.square().flatten(1).mean(1)
        if objective.edge_weight > 0:
            mse = mse + objective.edge_weight * difference_error(error)
        mse = weight * mse
        if self.steps is None:
            return {"loss": mse}
        x0 = to_x0_eps(objective.prediction, prediction.detach(), x_t, alpha, sigma).x0
        bits = self.steps.bound(image, x_t, t, x0, variance_share(output))
        return {"loss": mse + bits * self.schedule.num_train_steps / 1000, "mse": mse, "bits": bits}

    def classifier_loss(
        self, image: Tensor, text: TextFeatures, captions: Sequence[str], t: Tensor, eps: Tensor
    ) -> Tensor:
        """() of the classifier on pictures as noisy as those that it will guide."""
        assert self.classifier is not None
        x_t = self.schedule.add_noise(image, eps, t)
        return self.classifier.loss(x_t, self.model_time(x_t, t), text, captions)

    def predictor(
        self, text: TextFeatures, negative: TextFeatures, sampling: SamplingConfig
    ) -> Callable[[Tensor, Tensor], Prediction]:
        """(x_t, t) -> what the guided model predicts."""

        # A learned variance is not guided (GLIDE).
        output = classifier_free(self.denoise, text, negative, sampling, self.schedule, CHANNELS)

        def predict(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = self.schedule.alpha_sigma(t)
            out = output(x, t)
            p = to_x0_eps(self.config.objective.prediction, out[:, :CHANNELS], x, alpha, sigma)
            if sampling.classifier_scale > 0:
                assert self.classifier is not None  # the configuration was checked
                gradient = self.classifier.gradient(x, self.model_time(x, t), text)
                p = towards(p, gradient, sampling.classifier_scale, alpha, sigma)
            limit = sampling.threshold_percentile
            if sampling.clip_x0 or limit is not None:
                x0 = p.x0.clamp(-1, 1) if limit is None else thresholded(p.x0, limit)
                p = Prediction(x0, (x - per_sample(alpha, x) * x0) / per_sample(sigma, x), "x0")
            share = {
                "fixed_small": lambda: None,
                "fixed_large": lambda: torch.ones_like(x),
                "learned": lambda: variance_share(out),
            }[self.config.variance]()
            return Prediction(p.x0, p.eps, p.objective, share)

        return predict

    def check(self, request: SampleRequest, sampling: SamplingConfig) -> None:
        """Raises ConfigError for sides that the networks cannot halve, seams that they cannot join, and steps that
        there are not."""
        check_side(self.config, request.height_px, "height")
        check_side(self.config, request.width_px, "width")
        check_tile(request, self.denoiser)
        check_walk(request, sampling, self.schedule)

    @torch.no_grad()
    def generate(
        self, request: SampleRequest, sampling: SamplingConfig, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, 3, height_px, width_px) in [-1, 1], NaN where the model's numbers were not finite, on the model's
        device; see `t2i.interfaces.Generator`."""
        self.check(request, sampling)
        model = self.asked_predictor(request, sampling)
        # All randomness of picture i comes from its own generator: the first noise, then what the sampler adds.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        shape = (CHANNELS, request.height_px, request.width_px)
        noise = asked_noise(request, generators, shape).to(self.device)
        init = None if request.image is None else request.image.to(noise)
        constrain = None
        if request.mask is not None:
            assert init is not None
            constrain = kept(init, noise, request.mask.to(noise))
        with tiled(request.tile, self.denoiser):
            image = sample(
                model,
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
        return image.clamp(-1, 1) + 0 * image  # NaN where it was not finite

    @torch.no_grad()
    def invert(
        self, request: SampleRequest, sampling: SamplingConfig, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, 3, height_px, width_px); see `t2i.interfaces.Generator`."""
        assert request.image is not None
        plain = dataclasses.replace(
            sampling, guidance_scale=1.0, classifier_scale=0.0, clip_x0=False, threshold_percentile=None
        )
        self.check(dataclasses.replace(request, strength=1.0), sampling)
        model = self.asked_predictor(request, plain)
        return invert(model, request.image.to(self.device), self.schedule, sampling.steps, progress, sampling)

    def asked_predictor(
        self, request: SampleRequest, sampling: SamplingConfig
    ) -> Callable[[Tensor, Tensor], Prediction]:
        """`predictor` for the request."""
        negative = self.text([request.negative_prompt] * len(request.prompts))
        return self.predictor(asked_text(self.text, request), negative, sampling)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


def check_side(config: Config, side_px: int, key: str) -> None:
    """Raises ConfigError where the side of a picture cannot be halved as often as the networks do."""
    unit = config.denoiser.patch_size
    if isinstance(config.denoiser, UNetConfig):
        unit = config.denoiser.downsampling
    if config.classifier is not None:
        unit = math.lcm(unit, config.classifier.encoder.downsampling)
    check(side_px >= unit and side_px % unit == 0, key, side_px, f"multiples of {unit} with this model")


def variance_share(output: Tensor) -> Tensor:
    """Of (B, 6, H, W): the last three channels run from -1 to 1 between the least and the largest variance."""
    return (output[:, CHANNELS:] + 1) / 2


class TextUNet(nn.Module):
    """ADM's UNet given a caption: its pooled vector is added to the time embedding, its tokens are attended to."""

    def __init__(self, config: Config, shape: UNetConfig, token_dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.has_positions = shape.position_embedding
        self.pooled = nn.LayerNorm(pooled_dim)
        self.tokens: nn.Module | None = None
        if shape.cross_attention:
            self.tokens = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, config.text_width))
        out_channels = CHANNELS * (2 if config.variance == "learned" else 1)
        unet = UNet(shape, CHANNELS, out_channels, pooled_dim, config.text_width)
        self.unet = unet.to(memory_format=torch.channels_last)

    def hidden_matrices(self) -> list[nn.Parameter]:
        return self.unet.hidden_matrices()

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, context_mask: Tensor) -> Tensor:
        """x: (B, 3, H, W), t: (B,) in [0, 1000); context: (B, L, token_dim); pooled: (B, pooled_dim);
        context_mask: (B, L) bool, True where attended -> (B, 3 or 6, H, W)."""
        states = None if self.tokens is None else once(self.tokens, context)
        return self.unet(x, t, self.pooled(pooled), states, context_mask)


def build_denoiser(config: Config, token_dim: int, pooled_dim: int) -> TextUNet | DiT:
    """The network that the configuration names, for a text encoder's widths, called as `TextUNet.forward` is."""
    if isinstance(config.denoiser, DiTConfig):
        return DiT(config.denoiser, CHANNELS, token_dim, pooled_dim)
    return TextUNet(config, config.denoiser, token_dim, pooled_dim)


def build_classifier(config: Config, size_px: int, token_dim: int) -> NoisyMatcher | None:
    """The classifier of noisy pictures, where there is one."""
    return None if config.classifier is None else NoisyMatcher(config.classifier, size_px, token_dim)
