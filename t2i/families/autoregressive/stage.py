"""The autoregressive stage: learn which code of a frozen codec follows which, given the caption."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from t2i.config import RunConfig, check
from t2i.families.autoregressive.config import Config
from t2i.families.autoregressive.model import Autoregressive, build_codec
from t2i.families.autoregressive.palette import PaletteCodec
from t2i.families.builds_on import BuildsOn
from t2i.families.codec_run import codec_config, codec_run
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

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config)
        model = config.model
        assert isinstance(model, Config)
        step = config.data.bucket_step_px
        check(
            step is None, "data.bucket_step_px", step, "null with this model, whose grid of codes is square"
        )
        found, place = None, ""
        if model.builds_on is not None:
            found, place = codec_run(config, model.builds_on.codec, start)
            model = dataclasses.replace(model, builds_on=BuildsOn(place))
            self.config = dataclasses.replace(config, model=model)  # what was found is what config.yaml says
        self.model_config = model
        self.codec_config = {} if found is None else codec_config(found)
        self.model = Autoregressive(model, build_codec(model, self.codec_config), config.resolution.size_px)
        if start is not None:
            load_into(self.model, start.weights, start.path, prefix="model.")
        if found is not None and found is not start:
            load_into(self.model.codec, found.weights, found.path, prefix="codec.")
            if start is not None:
                check_codebook(self.model.codec, place, start.extra.get("codebook"), str(start.path))

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        codes = codes_of(batch, self.model.codec)
        return self.model.losses(codes, text_of(batch, self.model.text))

    def turns(self) -> list[Turn]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        hidden = self.model.transformer.hidden_matrices()
        return [Turn("transformer", [parameters], self.config.optimizer, hidden)]

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model.transformer)

    def features(self) -> Mapping[str, Feature]:
        text, builds_on = text_feature(self.model.text, self.model_config.text), self.model_config.builds_on
        return text if builds_on is None else {**codes_feature(self.model.codec, builds_on.codec), **text}

    def checkpoint_extra(self) -> dict[str, Any]:
        return {"codec": self.codec_config, "codebook": codebook_hash(self.model.codec)}

    def before_training(self, images: Iterable[Tensor]) -> None:
        if isinstance(self.model.codec, PaletteCodec):
            self.model.codec.fit(images)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.place_text(self.model.text)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """One picture per caption of the preview batch."""
        request = SampleRequest.of_size(batch.caption, self.config.resolution.size_px)
        return {"samples": self.model.generate(request, self.model_config.sampling)}
