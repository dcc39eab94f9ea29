"""The stages of masked modelling (2202.04200): tell the hidden codes of a picture from the others and the caption, and
in super-resolution from the codes at a lower resolution too (2301.00704, section 2.4)."""

from __future__ import annotations

from torch import Tensor

from t2i.codes.masked import random_mask
from t2i.config import RunConfig
from t2i.families.codes_stage import CodesStage
from t2i.families.masked.config import Config
from t2i.families.masked.model import MaskedModel, model_of
from t2i.interfaces import Batch
from t2i.training.checkpoint import LoadedCheckpoint
from t2i.training.randomness import Randomness


class Stage(CodesStage):
    """See `CodesStage`."""

    has_times = True
    model_config: Config
    model: MaskedModel

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config, start, model_of)
        if (step := config.data.bucket_step_px) is not None:
            self.model.check_buckets(step)

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        codes, low, text = self.given(batch, random)
        order = random.uniform("order", codes.shape[1] * codes.shape[2])
        hidden = random_mask(random.uniform("time"), order).view_as(codes)
        return {"loss": self.model.loss(codes, hidden, text, low).mean()}
