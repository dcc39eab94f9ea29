"""The pixel diffusion stage (2006.11239): denoise pictures, given the caption."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from t2i.config import RunConfig
from t2i.data_config import BUCKETS
from t2i.diffusion.objectives import loss_by_time
from t2i.families.pixel_diffusion.config import Config
from t2i.families.pixel_diffusion.model import PixelDiffusion, check_side
from t2i.interfaces import Batch, Feature, SampleRequest
from t2i.nn.blocks import blocks_of
from t2i.text.features import text_feature, text_of
from t2i.training.checkpoint import LoadedCheckpoint, load_into
from t2i.training.randomness import Randomness
from t2i.training.stage import BaseStage
from t2i.training.step import Turn


class Stage(BaseStage):
    """Trains the denoiser, the text encoder where that learns with it, and in a turn of its own the classifier."""

    has_times = True

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config)
        assert isinstance(config.model, Config)
        self.model_config = config.model
        size = config.resolution.size_px
        check_side(config.model, size, "resolution.size_px")
        if (step := config.data.bucket_step_px) is not None:
            check_side(config.model, step, BUCKETS)
        self.model = PixelDiffusion(config.model, size)
        if start is not None:
            load_into(self.model, start.weights, start.path, prefix="model.")

    def turns(self) -> list[Turn]:
        optimizer, classifier = self.config.optimizer, self.model.classifier
        of_classifier = [] if classifier is None else list(classifier.parameters())
        ids = {id(p) for p in of_classifier}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in ids]
        turns = [Turn("denoiser", [others], optimizer, self.model.denoiser.hidden_matrices())]
        if classifier is not None:
            turns.append(Turn("classifier", [of_classifier], optimizer, classifier.encoder.hidden_matrices()))
        return turns

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        t = self.model.schedule.training_times(random.uniform("time"))
        eps = random.normal("noise", *batch.image.shape[1:])
        text = text_of(batch, self.model.text)
        if turn == "classifier":
            return {"loss": self.model.classifier_loss(batch.image, text, batch.caption, t, eps)}
        losses = self.model.losses(batch.image, text, t, eps)
        means = {name: each.mean() for name, each in losses.items()}
        return means | loss_by_time(losses["loss"], t, self.model.schedule)

    def features(self) -> Mapping[str, Feature]:
        return text_feature(self.model.text, self.model_config.text)

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.model.denoiser)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.place_text(self.model.text)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """One picture per caption of the preview batch."""
        request = SampleRequest.of_size(batch.caption, self.config.resolution.size_px)
        return {"samples": self.model.generate(request, self.model_config.sampling)}
