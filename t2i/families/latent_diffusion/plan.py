"""The networks of a run, for `t2i plan`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2i.config import RunConfig
from t2i.families.codec import latent_codec
from t2i.families.latent_diffusion.config import Config, UNetDenoiserConfig
from t2i.families.latent_diffusion.model import build_denoiser, check_side
from t2i.interfaces import ImageCodec
from t2i.planned import PlannedNetwork
from t2i.text.architecture import build_architecture


def planned_networks(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> list[PlannedNetwork]:
    """See `t2i.families.family.Family`."""
    model, size = config.model, config.resolution.size_px
    assert isinstance(model, Config)
    with torch.device("meta"):
        codec = latent_codec(builds_on["codec"], model.builds_on.codec)
        text = build_architecture(model.text)
        denoiser = build_denoiser(model.denoiser, codec.latent_channels, text.token_dim, text.pooled_dim)
    check_side(model.denoiser, codec, size, "resolution.size_px")
    inpaints = isinstance(model.denoiser, UNetDenoiserConfig) and model.denoiser.masks is not None
    length, latent_shape = model.text.max_tokens, codec.latent_shape(size, size)
    takes = inspect.signature(denoiser.forward).parameters

    def denoised(batch: int) -> dict[str, Tensor]:
        given = {
            "x": torch.empty(batch, latent_shape[0] * (1 + inpaints) + inpaints, *latent_shape[1:]),
            "t": torch.empty(batch),
            "context": torch.empty(batch, length, text.token_dim, requires_grad=text.trainable),
            "pooled": torch.empty(batch, text.pooled_dim, requires_grad=text.trainable),
        }
        if model.mask_padding:
            given["context_mask"] = torch.ones(batch, length, dtype=torch.bool)
        return {name: value for name, value in given.items() if name in takes}

    encoding, decoding = Encoding(codec), Decoding(codec)
    encoder = sum(p.numel() for name, p in codec.named_parameters() if name in codec.encoding_weights())
    decoder = sum(p.numel() for p in codec.parameters()) - encoder
    return [
        PlannedNetwork("denoiser", denoiser, denoised, trained=True, hidden=denoiser.hidden_matrices()),
        PlannedNetwork(
            "codec encoder",
            encoding,
            lambda batch: {"image": torch.empty(batch, 3, size, size)},
            trained=False,
            calls_per_image=1 + inpaints,
            cached_as=None if inpaints else "latents",
            saved=True,
            copied=True,
            num_parameters=encoder,
        ),
        PlannedNetwork(
            "codec decoder",
            decoding,
            lambda batch: {"latent": torch.empty(batch, *latent_shape)},
            trained=False,
            calls_per_image=0,
            cached_as=None if inpaints else "latents",
            saved=True,
            copied=True,
            num_parameters=decoder,
        ),
        PlannedNetwork(
            "text encoder",
            text.network,
            lambda batch: {"input_ids": torch.zeros(batch, length, dtype=torch.int64)},
            trained=text.trainable,
            cached_as=None if text.trainable else "text",
            by_block=False,
        ),
    ]


class Encoding(nn.Module):
    """A codec's way from pictures to what latents are made of."""

    def __init__(self, codec: ImageCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, image: Tensor) -> Tensor:
        return self.codec.moments(image)


class Decoding(nn.Module):
    """A codec's way back."""

    def __init__(self, codec: ImageCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, latent: Tensor) -> Tensor:
        return self.codec.decode(latent)
