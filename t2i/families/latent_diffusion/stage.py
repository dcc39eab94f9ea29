"""The latent diffusion stage (2112.10752): denoise the latents of a frozen codec, given the caption."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2i.config import RunConfig
from t2i.data_config import BUCKETS
from t2i.diffusion.objectives import loss_by_time
from t2i.families.codec_run import codec_config, codec_run
from t2i.families.latent_diffusion.config import Config, UNetDenoiserConfig
from t2i.families.latent_diffusion.masks import known_part, random_masks
from t2i.families.latent_diffusion.model import build_model
from t2i.interfaces import Batch, Feature, ImageCodec, SampleRequest
from t2i.nn.blocks import blocks_of
from t2i.text.features import text_feature, text_of
from t2i.training.checkpoint import LoadedCheckpoint, load_into
from t2i.training.randomness import Randomness
from t2i.training.stage import BaseStage
from t2i.training.step import Turn


class Stage(BaseStage):
    """Trains the denoiser, and the text encoder where that learns with it."""

    has_times = True

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config)
        model = config.model
        assert isinstance(model, Config)
        builds_on, place = codec_run(config, model.builds_on.codec, start)
        model = dataclasses.replace(model, builds_on=dataclasses.replace(model.builds_on, codec=place))
        self.config = dataclasses.replace(config, model=model)  # what was found is what config.yaml says
        self.model_config = model
        self.working_codec: tuple[ImageCodec, ...] = ()  # in a tuple, so that it is no module of the stage
        self.codec_config = codec_config(builds_on)
        self.model = build_model(model, self.codec_config)
        size = config.resolution.size_px
        self.model.check_size(size, size, ("resolution.size_px", "resolution.size_px"))
        if (step := config.data.bucket_step_px) is not None:
            self.model.check_size(step, step, (BUCKETS, BUCKETS))
        if start is not None:
            load_into(self.model, self._fitted(start.weights), start.path, prefix="model.")
        if builds_on is not start:
            load_into(self.model.codec, builds_on.weights, builds_on.path, prefix="codec.")

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        moments = batch.features.get("moments")
        if moments is None:
            moments = self.moments(batch.image)
        shape = (self.model.codec.latent_channels, *moments.shape[2:])
        t = self.model.schedule.training_times(random.uniform("time"))
        eps = random.normal("noise", *shape)
        latent = self.model.codec.latent(moments, random.normal("posterior", *shape))
        known = self.known(batch.image, random) if self.model.inpaints else None
        losses = self.model.loss(latent, text_of(batch, self.model.text), t, eps, known)
        return {"loss": losses.mean(), **loss_by_time(losses, t, self.model.schedule)}

    @torch.no_grad()
    def moments(self, image: Tensor) -> Tensor:
        return self.codec.moments(image).to(self.weight_dtype)

    def known(self, image: Tensor, random: Randomness) -> Tensor:
        """(B, 1 + C, h, w): what a model that inpaints is given of the pictures, each with a mask of its own."""
        config = self.model_config.denoiser
        assert isinstance(config, UNetDenoiserConfig)
        assert config.masks is not None
        mask = random_masks(config.masks, random, *image.shape[2:])
        moments = self.moments(image * (1 - mask))
        shape = (self.model.codec.latent_channels, *moments.shape[2:])
        return known_part(mask, self.model.codec.latent(moments, random.normal("known posterior", *shape)))

    def turns(self) -> list[Turn]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        hidden = self.model.denoiser.hidden_matrices()
        return [Turn("denoiser", [parameters], self.config.optimizer, hidden)]

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model.denoiser)

    def features(self) -> Mapping[str, Feature]:
        """Of latents the posterior's moments, not a sample of it: that is drawn afresh each time a picture is seen. A
        model that inpaints sees the picture itself, under a new mask each time."""
        codec, config = self.model.codec, self.model_config
        if self.model.inpaints:
            return text_feature(self.model.text, config.text)
        latents = Feature(
            of="image",
            tensors=("moments",),
            make=lambda image: {"moments": codec.moments(image)},
            module=codec,
            weights=codec.encoding_weights,  # the decoder may differ
            settings=(type(codec).__name__,),
            made_by=config.builds_on.codec,
        )
        return {"latents": latents, **text_feature(self.model.text, config.text)}

    def checkpoint_extra(self) -> dict[str, Any]:
        return {"codec": self.codec_config}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.place_text(self.model.text)

        self.working_codec = ()
        encodes = any(part.encoded is None for part in self.config.data.parts().values())
        if self.frozen_dtype != self.weight_dtype and encodes:
            # A copy: the codec itself is saved with the run, as exact as it is.
            codec = copy.deepcopy(self.model.codec).to(self.device, self.frozen_dtype)
            codec.to(memory_format=torch.channels_last)
            self.working_codec = (codec,)

    @property
    def codec(self) -> ImageCodec:
        """That which encodes while training."""
        return self.working_codec[0] if self.working_codec else self.model.codec

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """One picture per caption of the preview batch."""
        request = SampleRequest.of_size(batch.caption, self.config.resolution.size_px)
        return {"samples": self.model.generate(request, self.model_config.sampling)}

    def _fitted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a run at a lower resolution, as this denoiser takes them."""
        prefix = "model.denoiser."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        return weights | {prefix + name: value for name, value in self.model.denoiser.fitted(own).items()}
