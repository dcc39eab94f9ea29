"""What the stages of models of codes share: the runs that they build on, and one transformer that learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from t2i.config import RunConfig
from t2i.families.codec_run import codec_config, codec_run, load_runs, low_run
from t2i.families.low_codes import CodesModel, low_codes_of, low_feature
from t2i.families.tokens import check_shift, codebook_hash, codes_feature, codes_of, moved
from t2i.interfaces import Batch, Feature, SampleRequest, TextFeatures
from t2i.nn.blocks import blocks_of
from t2i.text.features import text_feature, text_of
from t2i.training.checkpoint import LoadedCheckpoint
from t2i.training.randomness import Randomness
from t2i.training.stage import BaseStage
from t2i.training.step import Turn


class CodesStage(BaseStage):
    """Trains the transformer, and the text encoder where that learns with it.

    model_config: that of the family; without `builds_on` the model has its codec in itself
    model_of: the family's model of a run and what its checkpoint says beside (see `t2i.families.low_codes.with_low`)
    """

    model_config: Any
    model: Any

    def __init__(
        self,
        config: RunConfig,
        start: LoadedCheckpoint | None,
        model_of: Callable[[RunConfig, Mapping[str, Any]], CodesModel],
    ) -> None:
        super().__init__(config)
        model: Any = config.model
        check_shift(model.shift_px, config.resolution.size_px, config.data)
        codec, place, low = None, "", None
        self.extra: dict[str, Any] = {"codec": {}}
        if model.builds_on is not None:
            codec, place = codec_run(config, model.builds_on.codec, start)
            self.extra["codec"] = codec_config(codec)
            low_place = model.builds_on.low
            if low_place is not None:
                low, low_place, self.extra["low"] = low_run(config, low_place, start)
            found = dataclasses.replace(model.builds_on, codec=place, low=low_place)
            model = dataclasses.replace(model, builds_on=found)
            self.config = dataclasses.replace(config, model=model)  # what was found is what config.yaml says
        self.model_config = model
        self.model = model_of(self.config, self.extra)
        load_runs(self.model, start, codec, place, low)

    def given(self, batch: Batch, random: Randomness) -> tuple[Tensor, Tensor | None, TextFeatures]:
        """Of a training batch the codes (B, h, w) int64, in super-resolution those at the lower resolution, and the
        text's features."""
        batch = moved(batch, random, self.model_config.shift_px)
        return (
            codes_of(batch, self.model.codec),
            low_codes_of(batch, self.model.low),
            text_of(batch, self.model.text),
        )

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
        codes = codes_feature(model.codec, builds_on.codec)
        return {**codes, **low_feature(model.low, builds_on.low), **text}

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
