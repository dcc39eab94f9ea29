"""The networks of a run, built on the meta device, and what one picture takes of each."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2i import families
from t2i.config import RunConfig, check
from t2i.nn.blocks import blocks_of
from t2i.planning.count import (
    Activations,
    Flops,
    activations,
    flops,
    num_parameters,
    peak_bytes_per_image,
)
from t2i.planning.memory import Trained
from t2i.text.architecture import build_architecture


@dataclass(frozen=True)
class Part:
    """flops: of one training picture; None where training does not run it"""

    name: str
    parameters: int
    trained: bool
    flops: Flops | None


@dataclass(frozen=True)
class Model:
    """What is planned for.

    trained: with frozen encoders online
    encoding_per_image: bytes while the codec's encoder runs
    """

    denoiser: Part
    encoder: Part
    decoder: Part
    text: Part
    trained: Trained
    activations: Activations
    encoding_per_image: int

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.denoiser, self.encoder, self.decoder, self.text


def build_model(config: RunConfig, codec_values: Mapping[str, Any], device: str = "cuda") -> Model:
    """The model that `config` trains, on the codec that another run's top-level mapping describes.

    device: whose kernels decide what is kept for the backward pass, "cuda" or "cpu"
    Raises ConfigError where the family is not planned for, or the size does not fit the model.
    """
    check(config.family == "latent_diffusion", "family", config.family, "latent_diffusion, for a plan")
    settings: Any = config.model
    precision = config.trainer.precision
    check(precision != "64-true", "trainer.precision", precision, "32-true, bf16-mixed, 16-mixed, for a plan")
    size = config.resolution.size_px
    network = importlib.import_module(f"t2i.families.{config.family}.model")
    with torch.device("meta"):
        codec: Any = families.get(codec_values["family"]).load_codec()(codec_values)
        text = build_architecture(settings.text)
        denoiser = network.build_denoiser(
            settings.denoiser, codec.latent_channels, text.token_dim, text.pooled_dim
        )
    unit = codec.downsampling * network.latent_unit(settings.denoiser)
    check(size % unit == 0, "resolution.size_px", size, f"multiples of {unit} with this model")
    length = settings.text.max_tokens
    takes = inspect.signature(denoiser.forward).parameters

    def inputs(batch: int) -> dict[str, Tensor]:
        given = {
            "x": torch.empty(batch, *codec.latent_shape(size, size)),
            "t": torch.empty(batch),
            "context": torch.empty(batch, length, text.token_dim, requires_grad=text.trainable),
            "pooled": torch.empty(batch, text.pooled_dim, requires_grad=text.trainable),
        }
        if settings.mask_padding:
            given["context_mask"] = torch.ones(batch, length, dtype=torch.bool)
        return {name: value for name, value in given.items() if name in takes}

    def ids(batch: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(batch, length, dtype=torch.int64)}

    with torch.device("meta"):
        denoising = flops(lambda: denoiser(**inputs(1)), with_backward=True)
        encoding = flops(lambda: codec.encode(torch.empty(1, 3, size, size)), with_backward=False)
        reading = flops(lambda: text.network(**ids(1)), with_backward=text.trainable)
    kept = activations(denoiser, inputs, config.trainer.precision, device)
    trained: list[nn.Module] = [denoiser]
    if text.trainable:
        trained.append(text.network)
        of_text = activations(text.network, ids, config.trainer.precision, device)
        kept = Activations(*(a + b for a, b in zip(vars(kept).values(), vars(of_text).values(), strict=True)))
    encoder = num_parameters(codec.encoder, codec.quant_conv)
    decoder = num_parameters(codec) - encoder
    count = num_parameters(*trained)
    hidden = denoiser.hidden_matrices() if config.optimizer.muon_scale is not None else []
    return Model(
        denoiser=Part("denoiser", num_parameters(denoiser), True, denoising),
        encoder=Part("codec encoder", encoder, False, encoding),
        decoder=Part("codec decoder", decoder, False, None),
        text=Part("text encoder", num_parameters(text.network), text.trainable, reading),
        trained=Trained(
            parameters=count,
            muon=sum(p.numel() for p in hidden),
            averaged=count if config.ema is not None else 0,
            frozen=num_parameters(codec) + (0 if text.trainable else num_parameters(text.network)),
            largest_block=max(num_parameters(block) for part in trained for block in blocks_of(part)),
            compute_bytes=4 if config.trainer.precision == "32-true" else 2,
        ),
        activations=kept,
        encoding_per_image=peak_bytes_per_image(
            codec.encoder, (3, size, size), config.trainer.precision, device
        ),
    )
