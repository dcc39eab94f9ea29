"""The autoregressive stages: learn which code of a frozen codec follows which, given the caption, and in
super-resolution the codes at a lower resolution."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from t2i.codes.embedding import take_vectors
from t2i.config import RunConfig, check
from t2i.data_config import BUCKETS
from t2i.families.autoregressive.config import Config
from t2i.families.autoregressive.model import Autoregressive, model_of
from t2i.families.autoregressive.palette import PaletteCodec
from t2i.families.autoregressive.words import WordPrefix
from t2i.families.codes_stage import CodesStage
from t2i.interfaces import Batch
from t2i.training.checkpoint import LoadedCheckpoint
from t2i.training.randomness import Randomness


class Stage(CodesStage):
    """See `CodesStage`."""

    model_config: Config
    model: Autoregressive

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        step, allowed = config.data.bucket_step_px, "null with this model, whose grid of codes is square"
        check(step is None, BUCKETS, step, allowed)
        super().__init__(config, start, model_of)

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        codes, low, text = self.given(batch, random)
        return self.model.losses(codes, text, low)

    def blocks_to_gather(self) -> list[nn.Module]:
        """Not that of the words, whose loss is computed after its pass."""
        return [block for block in self.blocks() if not isinstance(block, WordPrefix)]

    def before_training(self, images: Iterable[Tensor]) -> None:
        if isinstance(self.model.codec, PaletteCodec):
            self.model.codec.fit(images)
            take_vectors(self.model.transformer, self.model.codec.code_vectors())
