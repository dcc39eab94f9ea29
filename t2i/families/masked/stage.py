"""The stages of masked modelling (2202.04200): tell the hidden codes of a picture from the others and the caption, and
in super-resolution from the codes at a lower resolution too (2301.00704, section 2.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from t2i.codes.masked import random_mask
from t2i.config import RunConfig
from t2i.families.codec_run import codec_config, codec_run, load_runs, low_run
from t2i.families.low_codes import low_codes_of, low_feature
from t2i.families.masked.config import Config
from t2i.families.masked.model import MaskedModel, model_of
from t2i.families.tokens import check_shift, codebook_hash, codes_feature, codes_of, moved
from t2i.interfaces import Batch, Feature, SampleRequest
from t2i.nn.blocks import blocks_of
from t2i.text.features import text_feature, text_of
from t2i.training.checkpoint import LoadedCheckpoint
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
        check_shift(model.shift_px, config.resolution.size_px, config.data)
        codec, place = codec_run(config, model.builds_on.codec, start)
        low, low_place = None, model.builds_on.low
        self.extra: dict[str, Any] = {"codec": codec_config(codec)}
        if low_place is not None:
            low, low_place, self.extra["low"] = low_run(config, low_place, start)
        built_on = dataclasses.replace(model.builds_on, codec=place, low=low_place)
        model = dataclasses.replace(model, builds_on=built_on)
        self.config = dataclasses.replace(config, model=model)  # what was found is what config.yaml says
        self.model_config = model
        self.model: MaskedModel = model_of(self.config, self.extra)
        load_runs(self.model, start, codec, place, low)

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        batch = moved(batch, random, self.model_config.shift_px)
        codes = codes_of(batch, self.model.codec)
        order = random.uniform("order", codes.shape[1] * codes.shape[2])
        hidden = random_mask(random.uniform("time"), order).view_as(codes)
        low = low_codes_of(batch, self.model.low)
        return {"loss": self.model.loss(codes, hidden, text_of(batch, self.model.text), low).mean()}

    def turns(self) -> list[Turn]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        hidden = self.model.transformer.hidden_matrices()
        return [Turn("transformer", [parameters], self.config.optimizer, hidden)]

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model.transformer)

    def features(self) -> Mapping[str, Feature]:
        config, model = self.model_config, self.model
        codes = codes_feature(model.codec, config.builds_on.codec)
        low = low_feature(model.low, config.builds_on.low)
        return {**codes, **low, **text_feature(model.text, config.text)}

    def checkpoint_extra(self) -> dict[str, Any]:
        return self.extra | {"codebook": codebook_hash(self.model.codec)}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.place_text(self.model.text)
        if self.model.low is not None:
            self.place_text(self.model.low.text)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """One picture per caption of the preview batch."""
        request = SampleRequest.of_size(batch.caption, self.config.resolution.size_px)
        return {"samples": self.model.generate(request, self.model_config.sampling)}
