"""The networks of a run, for `t2i plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2i.codes.quantizer import Quantizer
from t2i.config import RunConfig
from t2i.families.autoencoder.codec import DiscreteCodec, build_codec
from t2i.families.autoencoder.config import AdversarialConfig, Config
from t2i.families.autoencoder.discriminator import PatchDiscriminator
from t2i.nn.perceptual import build_architecture
from t2i.planned import PlannedNetwork


def planned_networks(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> list[PlannedNetwork]:
    """See `t2i.families.family.Family`. The discriminator counts from the first picture on. Left out: a codebook's
    distances, and the adaptive weight's own backward pass through the perceptual network (2% of kl_f8's FLOPs)."""
    model, size = config.model, config.resolution.size_px
    assert isinstance(model, Config)
    model.check_resolution(size)
    adversarial, encodes, decodes = model.adversarial, model.trained == "all", model.trained != "upsampler"
    small = size // model.upsampler.factor
    with torch.device("meta"):
        codec = build_codec(model)
        perceptual = build_architecture(model.perceptual.name)
        discriminator = PatchDiscriminator(adversarial.base_channels, adversarial.num_layers)
    code_shape = (codec.code_channels, *codec.latent_shape(size, size)[1:])

    def image(batch: int, side: int = size, learned: bool = False) -> Tensor:
        return torch.empty(batch, 3, side, side, requires_grad=learned)

    networks = [
        PlannedNetwork(
            "encoder",
            nn.Sequential(codec.encoder, codec.quant_conv),
            lambda batch: {"input": image(batch, small)},
            trained=encodes,
            saved=not encodes,
        ),
        PlannedNetwork(
            "decoder",
            nn.Sequential(codec.post_quant_conv, codec.decoder),
            lambda batch: {"input": torch.empty(batch, *code_shape, requires_grad=encodes)},
            trained=decodes,
            saved=not decodes,
        ),
    ]
    if codec.upsampler is not None:
        networks.append(
            PlannedNetwork(
                "upsampler", codec.upsampler, lambda batch: {"x": image(batch, small)}, trained=True
            )
        )
    if isinstance(codec, DiscreteCodec) and codec.codebook.needs_noise and encodes:
        positions = codec.latent_shape(size, size)
        networks.insert(
            1,
            PlannedNetwork(
                "codebook",
                _Drawn(codec.codebook),
                lambda batch: {
                    "logits": torch.empty(batch, *positions, requires_grad=True),
                    "noise": torch.empty(batch, *positions),
                },
                trained=True,
                by_block=False,
            ),
        )
    if adversarial.start_images is not None:
        networks.append(
            PlannedNetwork(
                "discriminator",
                discriminator,
                lambda batch: {"image": image(batch)},
                trained=True,
                calls_per_image=calls_of_discriminator(adversarial),
                averaged=False,
                by_block=False,
            )
        )
    if perceptual is not None:
        networks.append(
            PlannedNetwork(
                "perceptual network",
                perceptual,
                lambda batch: {"image": image(batch, learned=True), "target": image(batch)},
                trained=False,
            )
        )
    return networks


class _Drawn(nn.Module):
    """The codes that training draws, as one tensor."""

    def __init__(self, codebook: Quantizer) -> None:
        super().__init__()
        self.codebook = codebook

    def forward(self, logits: Tensor, noise: Tensor) -> Tensor:
        return self.codebook(logits, noise).latent


def calls_of_discriminator(config: AdversarialConfig) -> float:
    """It judges the real picture, the reconstruction, and the reconstruction again for the codec's own loss, whose two
    backward passes (one for the adaptive weight) leave out the weights: as much as one whole, and with one of them two
    thirds. The gradient penalty's pass and the backward pass through its backward pass are as much as two."""
    return 2 + (1 if config.adaptive else 2 / 3) + 2 * (config.r1_weight > 0)
