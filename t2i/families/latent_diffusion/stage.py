"""The latent diffusion stage (2112.10752): denoise the latents of a frozen codec, given the caption."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor, nn

from t2i import families
from t2i.config import RunConfig
from t2i.errors import CheckpointError
from t2i.families.latent_diffusion.config import Config
from t2i.families.latent_diffusion.dit import DiT
from t2i.families.latent_diffusion.model import LatentDiffusion
from t2i.interfaces import Batch, FeatureMakers, SampleRequest
from t2i.training import run_folder
from t2i.training.checkpoint import LoadedCheckpoint, load, load_into
from t2i.training.stage import BaseStage

log = logging.getLogger(__name__)


class Stage(BaseStage):
    """Trains the denoiser, and the text encoder where that learns with it."""

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config)
        model: Config = config.model
        if start is not None and model.autoencoder == "latest":
            builds_on, autoencoder = start, start.config["autoencoder"]
        else:
            builds_on, autoencoder = _autoencoder(config)
        model = dataclasses.replace(model, autoencoder=autoencoder)
        self.config = dataclasses.replace(config, model=model)  # what was found is what config.yaml says
        self.codec_config: dict[str, Any] = builds_on.extra.get("codec", builds_on.config)
        self.model = build_model(model, self.codec_config)
        size = config.resolution.size_px
        self.model.check_size(size, size, ("resolution.size_px", "resolution.size_px"))
        if start is not None:
            load_into(self.model, _fitted(start.weights, self.model.denoiser), start.path, prefix="model.")
        if builds_on is not start:
            load_into(self.model.codec, builds_on.weights, builds_on.path, prefix="codec.")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            moments = self.model.codec.moments(batch.image) if batch.moments is None else batch.moments
        shape = (self.model.codec.latent_channels, *moments.shape[2:])
        generator = self.step_generator()
        t = self.this_process(self.model.schedule.sample_times(self.images_per_step, generator, self.device))
        eps = self.noise(generator, shape)
        latent = self.model.codec.latent(moments, self.noise(generator, shape))
        text = self.model.text(batch.caption) if batch.text is None else batch.text
        losses = self.model.loss(latent, text, t, eps)
        return {"loss": losses.mean()}

    def hidden_matrices(self) -> list[nn.Parameter]:
        return self.model.denoiser.hidden_matrices()

    def feature_makers(self) -> FeatureMakers:
        text, config = self.model.text, self.config.model
        made_by = {
            "autoencoder": config.autoencoder,
            "text encoder": " ".join(
                filter(None, (config.text.name, config.text.model, config.text.weights))
            ),
        }
        return FeatureMakers(self.model.codec, None if text.trainable else text.encoder, made_by)

    def checkpoint_extra(self) -> dict[str, Any]:
        return {"codec": self.codec_config}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.model.text.to(self.device, self.weight_dtype)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """One picture per caption of the preview batch."""
        sampling, size = self.config.model.sampling, self.config.resolution.size_px
        request = SampleRequest.by_default(batch.caption, size, sampling)
        return {"samples": self.model.generate(request)}


def build_model(config: Config, codec_config: dict[str, Any]) -> LatentDiffusion:
    """The model with a randomly initialised codec of the family and shape that `codec_config` (the top-level
    mapping of the autoencoder's run) says."""
    codec = families.load(codec_config["family"], "codec").from_checkpoint(codec_config)
    return LatentDiffusion(config, codec)


def _fitted(weights: dict[str, Tensor], denoiser: nn.Module) -> dict[str, Tensor]:
    """The weights of a run at a lower resolution; a DiT's patches may have been smaller there."""
    if not isinstance(denoiser, DiT):
        return weights
    prefix = "model.denoiser."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights | {prefix + name: value for name, value in denoiser.fit_patches(own).items()}


def _autoencoder(config: RunConfig) -> tuple[LoadedCheckpoint, str]:
    """The autoencoder that config.model.autoencoder means, and its place."""
    place = config.model.autoencoder
    if place == "latest":
        found, passed_over = run_folder.newest_finished(config.runs_dir, "autoencoder")
        for run in passed_over:
            log.info("passes over %s, which did not come to its end", run)
        if found is None:
            raise CheckpointError(
                f"stage={config.stage} builds on an autoencoder, and {config.runs_dir}/autoencoder holds none: "
                "train one with `t2i train stage=autoencoder`, or give autoencoder=RUN or FILE."
            )
        place = str(found)
    log.info("builds on the autoencoder %s", place)
    return load(run_folder.weights_file(place)), place
