"""The stage of masked modelling (2202.04200): tell the hidden codes of a picture from the others and the caption."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from t2i.codes.masked import random_mask
from t2i.config import RunConfig
from t2i.families.builds_on import BuildsOn
from t2i.families.codec_run import codec_config, codec_run
from t2i.families.masked.config import Config
from t2i.families.masked.model import build_model
from t2i.families.tokens import check_codebook, codebook_hash, codes_feature, codes_of
from t2i.interfaces import Batch, Feature, SampleRequest
from t2i.nn.blocks import blocks_of
from t2i.text.features import text_feature, text_of
from t2i.training.checkpoint import LoadedCheckpoint, load_into
from t2i.training.randomness import Randomness
from t2i.training.stage import BaseStage
from t2i.training.step import Turn


class Stage(BaseStage):
    """Trains the transformer, and the text encoder where that learns with it."""

    has_times = True

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config)
        model = config.model
        assert isinstance(model, Config)
        builds_on, place = codec_run(config, model.builds_on.codec, start)
        model = dataclasses.replace(model, builds_on=BuildsOn(place))
        self.config = dataclasses.replace(config, model=model)  # what was found is what config.yaml says
        self.model_config = model
        self.codec_config = codec_config(builds_on)
        self.model = build_model(model, self.codec_config, config.resolution.size_px)
        if start is not None:
            load_into(self.model, start.weights, start.path, prefix="model.")
        if builds_on is not start:
            load_into(self.model.codec, builds_on.weights, builds_on.path, prefix="codec.")
            if start is not None:
                check_codebook(self.model.codec, place, start.extra.get("codebook"), str(start.path))

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        codes = codes_of(batch, self.model.codec)
        order = random.uniform("order", codes.shape[1] * codes.shape[2])
        hidden = random_mask(random.uniform("time"), order).view_as(codes)
        return {"loss": self.model.loss(codes, hidden, text_of(batch, self.model.text)).mean()}

    def turns(self) -> list[Turn]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        hidden = self.model.transformer.hidden_matrices()
        return [Turn("transformer", [parameters], self.config.optimizer, hidden)]

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model.transformer)

    def features(self) -> Mapping[str, Feature]:
        config = self.model_config
        codes = codes_feature(self.model.codec, config.builds_on.codec)
        return {**codes, **text_feature(self.model.text, config.text)}

    def checkpoint_extra(self) -> dict[str, Any]:
        return {"codec": self.codec_config, "codebook": codebook_hash(self.model.codec)}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.place_text(self.model.text)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """One picture per caption of the preview batch."""
        request = SampleRequest.of_size(batch.caption, self.config.resolution.size_px)
        return {"samples": self.model.generate(request, self.model_config.sampling)}
