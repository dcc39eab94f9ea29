"""The stage of GAN-INT-CLS (Reed et al., 1605.05396, algorithm 1): the discriminator's turn, then the generator's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from t2i.adversarial.losses import r1_penalty
from t2i.config import RunConfig, check
from t2i.data_config import BUCKETS
from t2i.families.gan_int_cls.config import Config
from t2i.families.gan_int_cls.losses import (
    generator_loss,
    interpolated_captions,
    matching_aware_loss,
    wrong_pairs,
)
from t2i.families.gan_int_cls.model import GanIntCls
from t2i.interfaces import Batch, Feature, SampleRequest
from t2i.nn.blocks import blocks_of
from t2i.nn.transfer import placed
from t2i.text.features import text_feature, text_of
from t2i.training.checkpoint import LoadedCheckpoint, load_into
from t2i.training.randomness import Randomness
from t2i.training.stage import BaseStage
from t2i.training.step import Turn


class Stage(BaseStage):
    """Trains generator and discriminator, each with an optimizer of its own. Wrong captions, captions to interpolate
    and batch norm's statistics are those of one micro-batch of one process."""

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config)
        model = config.model
        assert isinstance(model, Config)
        self.model_config = model
        size = config.trainer.images_at_a_time
        allowed = "2 or more in each micro-batch: the others' captions are the wrong ones"
        check(size >= 2, "trainer.batch_size", config.trainer.batch_size, allowed)
        allowed = "false with r1_weight above 0: torch does not differentiate compiled blocks twice"
        check(not (config.trainer.compile and model.r1_weight), "trainer.compile", True, allowed)
        step = config.data.bucket_step_px
        check(step is None, BUCKETS, step, "null with this model, which takes squares")
        self.model = GanIntCls(model, config.resolution.size_px)
        if start is not None:
            load_into(self.model, start.weights, start.path, prefix="model.")

    def turns(self) -> list[Turn]:
        networks = {"discriminator": self.model.discriminator, "generator": self.model.generator}
        return [
            Turn(name, [list(network.parameters())], self.config.optimizer)
            for name, network in networks.items()
        ]

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        pooled = text_of(batch, self.model.text).pooled
        noise = random.normal(f"noise of the {turn}", self.model.generator.noise_dim)
        if turn == "discriminator":
            return self.discriminator_losses(batch, pooled, noise)
        return self.generator_losses(pooled, noise, random)

    def discriminator_losses(self, batch: Batch, pooled: Tensor, noise: Tensor) -> dict[str, Tensor]:
        model, discriminator = self.model_config, self.model.discriminator
        with torch.no_grad():
            generated = self.model.generator(noise, pooled)
        penalised = model.r1_weight > 0 and self.steps_done % model.r1_every == 0
        image = batch.image.requires_grad_(penalised)
        seen = discriminator.seen(image)  # once, for both of its captions
        real, fake = discriminator.judge(seen, pooled), discriminator(generated, pooled)
        pictures, captions = wrong_pairs(batch.caption) if model.wrong_weight else ([], [])
        wrong = real[:0]
        if len(pictures) > 1:  # batch norm takes two
            of_picture, of_caption = (
                placed(torch.tensor(each), image.device) for each in (pictures, captions)
            )
            wrong = discriminator.judge(seen[of_picture], pooled[of_caption])
        loss = matching_aware_loss(real, wrong, fake, model.wrong_weight)
        losses = {"logit_real": real.mean(), "logit_fake": fake.mean()}
        if len(wrong):
            losses["logit_wrong"] = wrong.mean()
        if penalised:
            losses["r1"] = r1_penalty(image, real)
            loss = loss + 0.5 * model.r1_weight * model.r1_every * losses["r1"]
        return {"loss": loss, **losses}

    def generator_losses(self, pooled: Tensor, noise: Tensor, random: Randomness) -> dict[str, Tensor]:
        weight, count = self.model_config.interpolation_weight, len(pooled)
        if weight > 0:
            between = interpolated_captions(pooled)
            more = random.normal("noise of the interpolated captions", noise.shape[1])[: len(between)]
            pooled, noise = torch.cat([pooled, between]), torch.cat([noise, more])
        logits = self.model.discriminator(self.model.generator(noise, pooled), pooled)
        return {"loss": generator_loss(logits[:count], logits[count:], weight)}

    def features(self) -> Mapping[str, Feature]:
        return text_feature(self.model.text, self.model_config.text)

    def blocks(self) -> list[nn.Module]:
        return [*blocks_of(self.model.generator), *blocks_of(self.model.discriminator)]

    def blocks_to_gather(self) -> list[nn.Module]:
        """Not the discriminator's, which the gradient penalty goes through twice."""
        return blocks_of(self.model.generator)

    def averages(self) -> dict[str, nn.Parameter]:
        named = self.model.generator.named_parameters(prefix="model.generator")
        return dict(named)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.place_text(self.model.text)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """One picture per caption of the preview batch."""
        request = SampleRequest.of_size(batch.caption, self.config.resolution.size_px)
        return {"samples": self.model.generate(request, self.model_config.sampling)}
