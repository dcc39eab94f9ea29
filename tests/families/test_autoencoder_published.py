"""The published tokenizers: their sizes, to the digit, and their recipes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2i.families.autoencoder.codec import build_codec
from t2i.families.autoencoder.discriminator import PatchDiscriminator


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("num_codes", [1_024, 16_384])
def test_vqgan_f16(compose_run, num_codes):
    """2012.09841, and taming-transformers' configs/imagenet_vqgan.yaml."""
    shards = ("data.shards=x.tar", "perceptual.weights=vgg16.pth")
    config = compose_run(f"experiment=autoencoder/vqgan_f16_{num_codes}", *shards)
    model, batch = config.model, config.trainer.batch_size * config.trainer.devices
    with torch.device("meta"):
        codec = build_codec(model)
        adversarial = model.adversarial
        discriminator = PatchDiscriminator(adversarial.base_channels, adversarial.num_layers)
    assert (count(codec.encoder), count(codec.decoder)) == (29_298_176, 42_449_795)
    assert count(codec) + codec.codebook.codes.numel() == 72_141_699 + (num_codes - 1_024) * 256
    assert count(discriminator) == 2_765_633
    assert config.optimizer.learning_rate == pytest.approx(4.5e-6 * batch)
    assert (adversarial.start_images, adversarial.weight) == (250_000 * batch, 0.8)
    assert config.data.crop == "random"


def test_dalle(compose_run):
    """2102.12092, appendix A.2: networks, codes, and the schedules of 512 pictures a step."""
    config = compose_run("experiment=autoencoder/dvae", "data.shards=x.tar")
    with torch.device("meta"):
        codec = build_codec(config.model)
    assert count(codec.encoder) + count(codec.quant_conv) == 53_786_240
    assert count(codec.decoder) + count(codec.codebook) == 43_829_766
    assert count(codec) == 53_786_240 + 43_829_766
    batch = config.trainer.batch_size * config.trainer.processes
    assert (batch, config.trainer.num_images) == (512, 3_000_000 * 512)
    assert codec.codebook.anneal_images == 150_000 * batch
    assert codec.codebook.kl_warmup_images == 5_000 * batch
    assert codec.codebook.kl_weight == pytest.approx(6.6 / 192)


def test_vit_vqgan(compose_run):
    """2110.04627, table 1 and section 3.2: base, with 8,192 codes of 32 dimensions that are looked up by cosine."""
    shards = ("data.shards=x.tar", "perceptual.weights=vgg16.pth")
    with torch.device("meta"):
        codec = build_codec(compose_run("experiment=autoencoder/vit_vqgan", *shards).model)
    assert count(codec.encoder) + count(codec.decoder) == 171_925_251
    assert codec.codebook.codes.shape == (8192, 32)
    assert codec.codebook.normalize
    assert (codec.quant_conv.in_channels, codec.post_quant_conv.out_channels) == (768, 768)
