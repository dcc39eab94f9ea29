"""The patch backbone, both codecs on it, and when the discriminator joins."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from t2i.errors import ConfigError
from t2i.families.autoencoder.codec import Codec, build_codec
from t2i.families.autoencoder.codec_config import FSQConfig, KLConfig, VQConfig
from t2i.families.autoencoder.config import (
    AdversarialConfig,
    Config,
    DistanceConfig,
    LDMBackboneConfig,
    PatchBackboneConfig,
    PerceptualConfig,
)
from t2i.families.autoencoder.patch import from_patches, to_patches

pytestmark = pytest.mark.usefixtures("float64")

PATCH = PatchBackboneConfig("patch", patch_px=4, latent_channels=5, width=32, depth=1)
LDM = LDMBackboneConfig(
    base_channels=32,
    channel_mult=(1, 1, 2),
    num_res_blocks=1,
    latent_channels=5,
    resolution_px=32,
    attention_resolutions=(),
)
CODECS = {"kl": KLConfig("kl"), "vq": VQConfig("vq", num_codes=16), "fsq": FSQConfig("fsq", levels=(5, 5, 3))}


def build(codec: str = "kl", backbone: PatchBackboneConfig | LDMBackboneConfig = PATCH) -> Codec:
    torch.manual_seed(0)
    return build_codec(
        Config(
            CODECS[codec],
            backbone,
            PerceptualConfig("none", weight=0.0, weights=None),
            AdversarialConfig(None, weight=0.5, loss="hinge", base_channels=64, num_layers=3, r1_weight=0.0),
        )
    )


def smooth_pictures(number: int = 6, height: int = 32, width: int = 32) -> Tensor:
    """(N, 3, H, W) in [-1, 1], with the correlations of pictures."""
    noise = torch.randn(number, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").tanh()


def svd_error(image: Tensor, patch_px: int, components: int) -> float:
    """Mean squared error of the best linear code of the patches (Eckart & Young), by numpy."""
    n, c, h, w = image.shape
    patches = image.double().numpy().reshape(n, c, h // patch_px, patch_px, w // patch_px, patch_px)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(-1, c * patch_px**2)
    singular = np.linalg.svd(patches - patches.mean(0), compute_uv=False)
    return float((singular[components:] ** 2).sum() / patches.size)


def test_patches_come_back():
    image = torch.randn(2, 3, 8, 12)
    patches = to_patches(image, 4)
    assert patches.shape == (2, 48, 2, 3)
    assert torch.equal(from_patches(patches, 4), image)
    assert torch.equal(patches[1, :16, 1, 2].view(4, 4), image[1, 0, 4:8, 8:12])


@pytest.mark.parametrize(("patch_px", "channels"), [(4, 1), (4, 5), (4, 20), (2, 3), (8, 16)])
def test_starts_as_the_best_linear_code(patch_px, channels):
    image = smooth_pictures()
    backbone = dataclasses.replace(PATCH, patch_px=patch_px, latent_channels=channels)
    codec = build(backbone=backbone)
    codec.initialise(image)
    with torch.no_grad():
        error = (codec.reconstruct(image).image - image).square().mean().item()
    assert error == pytest.approx(svd_error(image, patch_px, channels), rel=1e-3, abs=1e-9)


def test_the_code_starts_with_unit_variance_and_the_posterior_narrow():
    image = smooth_pictures()
    codec = build()
    codec.initialise(image)
    with torch.no_grad():
        posterior = codec.posterior(image)
    assert posterior.mean.square().mean().item() == pytest.approx(1, rel=1e-3)
    assert posterior.logvar.exp().sqrt().max() < 0.06


def test_flat_pictures_are_no_reason_to_fail():
    codec = build()
    codec.initialise(torch.zeros(2, 3, 32, 32))
    with torch.no_grad():
        assert codec.reconstruct(torch.zeros(2, 3, 32, 32)).image.abs().max() < 1e-5


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_residual_starts_at_zero_and_learns(side):
    codec, image = build(), smooth_pictures()
    branch = getattr(codec, side).residual
    given = to_patches(image, 4) if side == "encoder" else torch.randn(6, 5, 8, 8)
    code = branch(given)[:, :5]
    assert code.eq(0).all()
    optimizer = torch.optim.SGD(codec.parameters(), lr=0.1)
    for _ in range(3):  # one zero-initialised layer wakes the next
        optimizer.zero_grad()
        (codec.reconstruct(image).image - image).square().mean().backward()
        optimizer.step()
    silent = [name for name, p in branch.named_parameters() if p.grad is None or p.grad.eq(0).all()]
    assert silent == []


@pytest.mark.parametrize("backbone", [PATCH, LDM], ids=["patch", "ldm"])
@pytest.mark.parametrize("name", list(CODECS))
def test_encode_and_decode(name, backbone):
    """Shapes, square or not, and a latent scale that makes the standard deviation 1."""
    codec = build(name, backbone)
    image = smooth_pictures(height=32, width=48)
    codec.initialise(image)
    codec.reconstruct(image)  # in training mode: the first batch gives the codebook its codes
    codec.eval()
    with torch.no_grad():
        assert codec.downsampling == 4
        shape = (3 if name == "fsq" else 5, 8, 12)
        assert codec.latent_shape(32, 48) == shape
        unscaled = codec.encode(image)
        assert unscaled.shape == (6, *shape)
        before = codec.decode(unscaled)
        assert before.shape == image.shape
        codec.measure_scale([10 * part for part in image.split(2)])  # a second measure starts over
        codec.measure_scale(image.split(2))
        latent = codec.encode(image)
        assert latent.std().item() == pytest.approx(1, rel=1e-4)
        torch.testing.assert_close(latent, unscaled * codec.latent_scale)
        torch.testing.assert_close(codec.decode(latent), before, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(codec.reconstruct(image).image, before, rtol=1e-9, atol=1e-9)
    assert "latent_scale" in codec.state_dict()


def test_noise_makes_a_sample_of_the_posterior():
    codec, image = build().eval(), smooth_pictures()
    noise = torch.randn(6, 5, 8, 8)
    with torch.no_grad():
        codec.latent_scale.fill_(2.0)
        posterior = codec.posterior(image)
        expected = 2 * (posterior.mean + posterior.logvar.mul(0.5).exp() * noise)
        torch.testing.assert_close(codec.encode(image, noise), expected)
        assert torch.equal(codec.encode(image), 2 * posterior.mean)


def test_decoding_quantises():
    """Latents that diffusion leaves near a code decode as the code does."""
    codec = build("vq")
    image = smooth_pictures()
    codec.initialise(image)
    codec.reconstruct(image)
    codec.eval()
    codes = codec.codebook.codes[torch.randint(16, (2, 4, 4), generator=torch.Generator().manual_seed(0))]
    latent = codes.permute(0, 3, 1, 2)
    with torch.no_grad():
        near = codec.decode(latent + 1e-4 * torch.randn(latent.shape))
        torch.testing.assert_close(near, codec.decode(latent), rtol=0, atol=1e-9)


def test_the_regulariser_is_the_papers():
    """KL: kl_weight times the nats of a picture, per value of it (2112.10752, appendix G)."""
    codec, image = build(), smooth_pictures()
    with torch.no_grad():
        result, posterior = codec.reconstruct(image), codec.posterior(image)
    normal = torch.distributions.Normal(posterior.mean, posterior.logvar.mul(0.5).exp())
    nats = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum() / len(image)
    assert result.regularizer.item() == pytest.approx(1e-6 * nats.item() / (3 * 32 * 32), rel=1e-4)


def test_the_distance_is_what_the_configuration_names():
    """Squared errors, and those of the differences between neighbours: of a step of height h along columns only."""
    codec, image = build(), torch.zeros(2, 3, 8, 4)
    output = torch.zeros_like(image)
    output[..., 2:] = 0.6
    torch.testing.assert_close(codec.distance(output, image), torch.tensor(0.3))
    codec.distance_config = DistanceConfig("l2", edge_weight=0.0)
    torch.testing.assert_close(codec.distance(output, image), torch.tensor(0.18))
    codec.distance_config = DistanceConfig("l2", edge_weight=0.5)
    torch.testing.assert_close(codec.distance(output, image), torch.tensor(0.18 + 0.5 * 0.36 / 3))
    for name, weight in (("l1", 1.0), ("l2", -1.0)):
        with pytest.raises(ConfigError, match=r"distance\.edge_weight is"):
            DistanceConfig(name, edge_weight=weight)


def test_pictures_that_do_not_divide_are_refused():
    config = Config(
        CODECS["kl"],
        PATCH,
        PerceptualConfig("none", weight=0.0, weights=None),
        AdversarialConfig(None, weight=0.5, loss="hinge", base_channels=64, num_layers=3, r1_weight=0.0),
    )
    config.check_resolution(36)
    with pytest.raises(ConfigError, match=r"resolution\.size_px is 34; allowed: multiples of 4"):
        config.check_resolution(34)


def test_the_discriminator_moves_and_counts_from_its_start_on(compose_run, tmp_path):
    """start_images is 16: with batch 8 the third step is the first that has it."""
    from rich.console import Console

    from t2i.families.autoencoder.stage import Stage
    from t2i.training.fit import fit

    history: list[tuple[Tensor, set[str]]] = []

    class Spied(Stage):
        def configure_callbacks(self):
            return [Spy()]

    class Spy(Callback):
        def on_train_batch_end(self, trainer, stage, *args):
            weights = torch.cat([p.detach().flatten() for p in stage.discriminator.parameters()])
            history.append((weights, set(stage.metrics)))

        def on_train_start(self, trainer, stage):
            self.on_train_batch_end(trainer, stage)

    config = compose_run(
        *("experiment=autoencoder/tiny_kl", "trainer.num_images=32", f"runs_dir={tmp_path}"),
        *("adversarial.start_images=16", "trainer.precision=64-true"),
    )
    fit(config, Spied, Console(quiet=True))
    moved = [not torch.equal(before[0], after[0]) for before, after in itertools.pairwise(history)]
    assert moved == [False, False, True, True]
    assert ["discriminator" in metrics for _, metrics in history[1:]] == [False, False, True, True]
