"""The autoregressive stages: learn which code of a frozen codec follows which, given the caption, and in
super-resolution the codes at a lower resolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from t2i.codes.embedding import take_vectors
from t2i.config import RunConfig, check
from t2i.families.autoregressive.config import Config
from t2i.families.autoregressive.model import Autoregressive, model_of
from t2i.families.autoregressive.palette import PaletteCodec
from t2i.families.codec_run import codec_config, codec_run, load_runs, low_run
from t2i.families.low_codes import low_codes_of, low_feature
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

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config)
        model = config.model
        assert isinstance(model, Config)
        check_shift(model.shift_px, config.resolution.size_px, config.data)
        step = config.data.bucket_step_px
        check(
            step is None, "data.bucket_step_px", step, "null with this model, whose grid of codes is square"
        )
        found, place, low = None, "", None
        self.extra: dict[str, Any] = {"codec": {}}
        if model.builds_on is not None:
            found, place = codec_run(config, model.builds_on.codec, start)
            self.extra["codec"] = codec_config(found)
            low_place = model.builds_on.low
            if low_place is not None:
                low, low_place, self.extra["low"] = low_run(config, low_place, start)
            built_on = dataclasses.replace(model.builds_on, codec=place, low=low_place)
            model = dataclasses.replace(model, builds_on=built_on)
            self.config = dataclasses.replace(config, model=model)  # what was found is what config.yaml says
        self.model_config = model
        self.model: Autoregressive = model_of(self.config, self.extra)
        load_runs(self.model, start, found, place, low)

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        batch = moved(batch, random, self.model_config.shift_px)
        codes = codes_of(batch, self.model.codec)
        low = low_codes_of(batch, self.model.low)
        return self.model.losses(codes, text_of(batch, self.model.text), low)

    def turns(self) -> list[Turn]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        hidden = self.model.transformer.hidden_matrices()
        return [Turn("transformer", [parameters], self.config.optimizer, hidden)]

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model.transformer)

    def features(self) -> Mapping[str, Feature]:
        model, builds_on = self.model, self.model_config.builds_on
        text = text_feature(model.text, self.model_config.text)
        if builds_on is None:
            return text
        return {
            **codes_feature(model.codec, builds_on.codec),
            **low_feature(model.low, builds_on.low),
            **text,
        }

    def checkpoint_extra(self) -> dict[str, Any]:
        return self.extra | {"codebook": codebook_hash(self.model.codec)}

    def before_training(self, images: Iterable[Tensor]) -> None:
        if isinstance(self.model.codec, PaletteCodec):
            self.model.codec.fit(images)
            take_vectors(self.model.transformer, self.model.codec.code_vectors())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.place_text(self.model.text)
        if self.model.low is not None:
            self.place_text(self.model.low.text)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """One picture per caption of the preview batch."""
        request = SampleRequest.of_size(batch.caption, self.config.resolution.size_px)
        return {"samples": self.model.generate(request, self.model_config.sampling)}
