"""What encodes and decodes: the network that `backbone` names, with the 1x1 convolutions around the bottleneck."""

from __future__ import annotations

from torch import nn

from t2i.families.autoencoder.backbone_config import DVAEBackboneConfig, ViTBackboneConfig
from t2i.families.autoencoder.config import BackboneConfig, PatchBackboneConfig
from t2i.families.autoencoder.dvae import DVAEDecoder, DVAEEncoder, ToLogits, convolution
from t2i.families.autoencoder.model import Decoder, Encoder
from t2i.families.autoencoder.patch import PatchDecoder, PatchEncoder
from t2i.families.autoencoder.vit import ViTDecoder, ViTEncoder


def build_backbone(
    config: BackboneConfig, encoder_channels: int, moment_channels: int, code_channels: int
) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """The encoder, the convolution behind it, the one in front of the decoder, and the decoder.

    encoder_channels: that the encoder ends with, where it does not have a width of its own
    moment_channels: after the convolution behind the encoder
    code_channels: before the convolution in front of the decoder
    """
    if isinstance(config, ViTBackboneConfig):
        down = nn.Conv2d(config.encoder.width, moment_channels, 1)
        up = nn.Conv2d(code_channels, config.decoder.width, 1)
        return ViTEncoder(config), down, up, ViTDecoder(config)
    latent = config.latent_channels
    if isinstance(config, DVAEBackboneConfig):
        logits = convolution(config.encoder_channels, moment_channels, 1, ToLogits)
        return DVAEEncoder(config), logits, _unless_equal(code_channels, latent), DVAEDecoder(config)
    if isinstance(config, PatchBackboneConfig):
        first, second = (
            _unless_equal(encoder_channels, moment_channels),
            _unless_equal(code_channels, latent),
        )
        return PatchEncoder(config, encoder_channels), first, second, PatchDecoder(config)
    around = nn.Conv2d(encoder_channels, moment_channels, 1), nn.Conv2d(code_channels, latent, 1)
    return Encoder(config, encoder_channels), *around, Decoder(config)


def _unless_equal(before: int, after: int) -> nn.Module:
    return nn.Identity() if before == after else nn.Conv2d(before, after, 1)
