"""The stages of masked modelling (2202.04200): tell the hidden codes of a picture from the others and the caption, and
in super-resolution from the codes at a lower resolution too (2301.00704, section 2.6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2i.codes.masked import random_mask
from t2i.config import RunConfig, check
from t2i.errors import CheckpointError
from t2i.families.codec_run import codec_config, codec_run
from t2i.families.masked.config import Config, MaskedBuildsOn
from t2i.families.masked.model import MaskedModel, model_of, smaller
from t2i.families.tokens import (
    check_codebook,
    codebook_hash,
    codes_feature,
    codes_of,
    smallest_integer,
)
from t2i.interfaces import Batch, Feature, SampleRequest
from t2i.nn.blocks import blocks_of
from t2i.text.features import text_feature, text_of
from t2i.training import run_folder
from t2i.training.checkpoint import LoadedCheckpoint, load, load_into
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
        codec, place = codec_run(config, model.builds_on.codec, start)
        low, low_place = None, model.builds_on.low
        self.extra: dict[str, Any] = {"codec": codec_config(codec)}
        if low_place is not None:
            low, low_place, self.extra["low"] = low_run(config, low_place, start)
        model = dataclasses.replace(model, builds_on=MaskedBuildsOn(place, low_place))
        self.config = dataclasses.replace(config, model=model)  # what was found is what config.yaml says
        self.model_config = model
        self.model: MaskedModel = model_of(self.config, self.extra)
        if start is not None:
            load_into(self.model, start.weights, start.path, prefix="model.")
        if codec is not start:
            load_into(self.model.codec, codec.weights, codec.path, prefix="codec.")
            if start is not None:
                check_codebook(self.model.codec, place, start.extra.get("codebook"), str(start.path))
        if low is not None and low is not start:
            assert self.model.low is not None
            load_into(self.model.low, low.weights, low.path, prefix="model.")

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        codes = codes_of(batch, self.model.codec)
        order = random.uniform("order", codes.shape[1] * codes.shape[2])
        hidden = random_mask(random.uniform("time"), order).view_as(codes)
        low = None if self.model.low is None else self.low_codes_of(batch)
        return {"loss": self.model.loss(codes, hidden, text_of(batch, self.model.text), low).mean()}

    def low_codes_of(self, batch: Batch) -> Tensor:
        """(B, h', w') int64 of the batch's pictures, computed ahead or now."""
        codes = batch.features.get("low_codes")
        return self.low_codes(batch.image) if codes is None else codes.long()

    @torch.no_grad()
    def low_codes(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h', w') int64 of the pictures at the lower resolution."""
        assert self.model.low is not None
        side = self.model.low.size_px
        return self.model.low.codec.tokens(smaller(image, (side, side)))

    def turns(self) -> list[Turn]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        hidden = self.model.transformer.hidden_matrices()
        return [Turn("transformer", [parameters], self.config.optimizer, hidden)]

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model.transformer)

    def features(self) -> Mapping[str, Feature]:
        config, low = self.model_config, self.model.low
        features = dict(codes_feature(self.model.codec, config.builds_on.codec))
        if low is not None:
            dtype = smallest_integer(low.codec.num_codes)
            features["low_codes"] = dataclasses.replace(
                codes_feature(low.codec, str(config.builds_on.low))["codes"],
                tensors=("low_codes",),
                make=lambda image: {"low_codes": self.low_codes(image).to(dtype)},
            )
        return {**features, **text_feature(self.model.text, config.text)}

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


def low_run(
    config: RunConfig, place: str, start: LoadedCheckpoint | None
) -> tuple[LoadedCheckpoint, str, dict[str, Any]]:
    """The checkpoint that builds_on.low of `config` means, its place, and what a checkpoint has to say of it: "config"
    and "extra" of its own. Raises CheckpointError or ConfigError.

    place: what builds_on.low says; start: what the run continues, whose low run "latest" then means
    """
    if place == "latest" and start is not None and "low" in start.extra:
        return start, start.config["builds_on"]["low"], start.extra["low"]
    if place == "latest":
        newest, _ = run_folder.newest_finished(config.runs_dir, ["masked"])
        if newest is None:
            raise CheckpointError(
                f"stage={config.stage} builds on a run of stage masked at a lower resolution, and there is none in "
                f"{config.runs_dir}/masked: train one, or give builds_on.low=RUN or FILE."
            )
        place = str(newest)
    found = load(run_folder.weights_file(place))
    stage = found.config.get("stage")
    check(stage == "masked", "builds_on.low", f"{place}, of stage {stage}", "a run of stage masked")
    return found, place, {"config": found.config, "extra": found.extra}
