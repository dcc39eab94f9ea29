"""The autoencoder stage: reconstruct, with a perceptual and a patch-adversarial loss (LDM paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

from t2i.adversarial.losses import r1_penalty
from t2i.config import RunConfig, check
from t2i.data_config import BUCKETS
from t2i.families.autoencoder.codec import KLCodec, build_codec
from t2i.families.autoencoder.config import Config
from t2i.families.autoencoder.discriminator import PatchDiscriminator
from t2i.families.autoencoder.losses import MAX_ADAPTIVE_WEIGHT, adaptive_weight, gan_losses
from t2i.families.autoencoder.part_start import check_encodes_alike, check_same_kind, load_for_part
from t2i.interfaces import Batch
from t2i.nn.blocks import blocks_of
from t2i.nn.perceptual import build_perceptual
from t2i.nn.precision import rounded
from t2i.training.checkpoint import LoadedCheckpoint, load_into
from t2i.training.randomness import Randomness
from t2i.training.stage import BaseStage
from t2i.training.step import Turn


class Stage(BaseStage):
    """Trains a codec. The discriminator is trained in the same backward pass (see losses.gan_losses)."""

    def __init__(self, config: RunConfig, start: LoadedCheckpoint | None = None) -> None:
        super().__init__(config)
        model = config.model
        assert isinstance(model, Config)
        self.model_config = model
        model.check_resolution(config.resolution.size_px)
        if (step := config.data.bucket_step_px) is not None:
            model.check_resolution(step, BUCKETS)
        twice = model.adversarial.start_images is not None and model.adversarial.r1_weight > 0
        allowed = (
            "false with adversarial.r1_weight above 0: torch does not differentiate compiled blocks twice"
        )
        check(not (config.trainer.compile and twice), "trainer.compile", True, allowed)
        if start is not None:
            check_same_kind(model, start)
        self.codec = build_codec(model)
        if model.trained != "all":
            check(start is not None, "trained", model.trained, "all without init_from=RUN, a run of a codec")
            assert start is not None
            load_for_part(self.codec, start)
            check_encodes_alike(model, start)
            self.codec.freeze()
        elif start is not None:
            load_into(self.codec, start.weights, start.path, prefix="codec.")
        perceptual = build_perceptual(model.perceptual.name, model.perceptual.weights)
        # In a tuple, so that the frozen network enters neither the state dict nor the parameters.
        self.perceptual: tuple[nn.Module, ...] = () if perceptual is None else (perceptual,)
        self.discriminator: nn.Module | None = None
        if model.adversarial.start_images is not None:
            self.discriminator = PatchDiscriminator(
                model.adversarial.base_channels, model.adversarial.num_layers
            )

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        model, image = self.model_config, batch.image
        if model.vertical_flip:
            turned = random.uniform("vertical flip")[:, None, None, None] < 0.5
            image = torch.where(turned, image.flip(2), image)
        noise = self.codec.noise(random, *image.shape[2:])
        reconstruction = self.codec.reconstruct(image, noise, self.images_seen)

        error = reconstruction.image.detach() - image
        psnr_db = 10 * torch.log10(4 / error.square().mean())
        metrics = {"l1": error.abs().mean(), "psnr_db": psnr_db, **reconstruction.metrics}
        if self.codec.logit_laplace:
            metrics["logit_laplace"] = reconstruction.distance
        fidelity = reconstruction.distance
        for network in self.perceptual:
            metrics["perceptual"] = network(reconstruction.image, image).mean()
            fidelity = fidelity + model.perceptual.weight * metrics["perceptual"]
        loss = fidelity + reconstruction.regularizer
        if self.discriminator is not None:
            loss = loss + self.adversarial_loss(
                self.discriminator, image, reconstruction.image, fidelity, metrics
            )
        return {"loss": loss, **metrics}

    def adversarial_loss(
        self,
        discriminator: nn.Module,
        real: Tensor,
        fake: Tensor,
        fidelity: Tensor,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """Scalar: weight * lambda * L_G + L_D, lambda the adaptive weight of 2012.09841, equation 7, or 1; before
        start_images a zero that still uses every parameter, as DDP wants."""
        config = self.model_config.adversarial
        assert config.start_images is not None
        if self.images_seen < config.start_images:
            return 0.0 * torch.stack([p.sum() for p in discriminator.parameters()]).sum()
        gan = gan_losses(discriminator, real, fake, config.loss)
        weight = fidelity.new_ones(())
        if config.adaptive:
            # The loss that LDM's code limits it beside (contperceptual.py) is a sum over a picture's values, ours their
            # mean. VQGAN's is a mean too (vqperceptual.py).
            values = real[0].numel() if isinstance(self.codec, KLCodec) else 1
            limit = MAX_ADAPTIVE_WEIGHT / values
            weight = adaptive_weight(fidelity, gan.generator, self.codec.last_layer, limit)
        metrics |= {
            "generator": gan.generator,
            "discriminator": gan.discriminator,
            "adaptive_weight": weight,
            "logit_real": gan.mean_logit_real,
            "logit_fake": gan.mean_logit_fake,
        }
        loss = config.weight * weight * gan.generator + gan.discriminator
        if config.r1_weight:
            real = real.detach().requires_grad_()
            metrics["r1"] = r1_penalty(real, discriminator(real))
            loss = loss + 0.5 * config.r1_weight * metrics["r1"]
        return loss

    def turns(self) -> list[Turn]:
        """One: both learn from the same backward pass, each by its own loss."""
        discriminator = [] if self.discriminator is None else [list(self.discriminator.parameters())]
        codec = [p for p in self.codec.parameters() if p.requires_grad]
        return [Turn("codec", [codec, *discriminator], self.config.optimizer)]

    def codec_blocks(self) -> list[nn.Module]:
        parts = {"all": self.codec, "decoder": self.codec.decoder, "upsampler": self.codec.upsampler}
        learning = parts[self.codec.learning]
        assert learning is not None
        return blocks_of(learning)

    def blocks(self) -> list[nn.Module]:
        discriminator = [] if self.discriminator is None else blocks_of(self.discriminator)
        return [*self.codec_blocks(), *discriminator]

    def blocks_to_gather(self) -> list[nn.Module]:
        """Not the discriminator's, nor the one with the layer at which the adaptive weight compares gradients."""
        if self.discriminator is None:
            return self.codec_blocks()
        last = self.codec.last_layer
        return [block for block in self.codec_blocks() if all(p is not last for p in block.parameters())]

    def idle_parameters(self) -> list[nn.Parameter]:
        """The discriminator's, before it learns: steps with gradients of zero would make its first real step larger
        (Adam's averages, 1412.6980, would be taken for those of many steps)."""
        waits = self.images_seen < (self.model_config.adversarial.start_images or 0)
        return [] if self.discriminator is None or not waits else list(self.discriminator.parameters())

    def averages(self) -> dict[str, nn.Parameter]:
        return {f"codec.{name}": p for name, p in self.codec.named_parameters() if p.requires_grad}

    def inference_weights(self) -> dict[str, Tensor]:
        return {
            name: value for name, value in super().inference_weights().items() if name.startswith("codec.")
        }

    def before_training(self, images: Iterable[Tensor]) -> None:
        self.codec.initialise(torch.cat(list(images)))

    def after_training(self, images: Iterable[Tensor]) -> None:
        if self.codec.learning == "all":
            self.codec.eval().measure_scale(images)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for network in self.perceptual:
            network.to(self.device, self.weight_dtype)
            if self.frozen_dtype != self.weight_dtype:
                rounded(network.to(memory_format=torch.channels_last), self.frozen_dtype)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """Rows of eight pictures, the last one filled up with white, each above the row of their
        reconstructions."""
        pairs = torch.stack([batch.image, self.codec.reconstruct(batch.image).image])
        white = pairs.new_ones(2, -len(batch) % 8, *batch.image.shape[1:])
        filled = torch.cat([pairs, white], dim=1).clamp(-1, 1)
        rows = rearrange(filled, "pair (row eight) c h w -> (row pair eight) c h w", eight=8)
        return {"reconstructions": rows}
