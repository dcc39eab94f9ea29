"""The adversarial losses and the patch discriminator: gradients, closed forms, one pass for both sides."""

import pytest
import torch
from torch import nn

from t2i.adversarial.losses import r1_penalty
from t2i.families.autoencoder.discriminator import PatchDiscriminator
from t2i.families.autoencoder.losses import LOSSES, adaptive_weight, gan_losses

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_discriminator() -> PatchDiscriminator:
    return PatchDiscriminator(base_channels=8, num_layers=2)


@pytest.mark.parametrize(("size", "out"), [(24, 1), (32, 2), (64, 6), (256, 30)])
def test_patch_grid(size, out):
    with torch.device("meta"):
        assert PatchDiscriminator()(torch.zeros(2, 3, size, size)).shape == (2, 1, out, out)


def test_receptive_field_is_70_px():
    discriminator = PatchDiscriminator(base_channels=8).double()
    # Without the norms, which see the whole picture.
    layers = [m for m in discriminator.layers if not isinstance(m, nn.GroupNorm)]
    discriminator.layers = nn.Sequential(*layers)
    image = torch.randn(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(discriminator(image)[0, 0, 15, 15], image)
    rows = grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_one_picture_does_not_change_anothers_logits():
    discriminator = small_discriminator()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]))


def test_initial_weights():
    discriminator = PatchDiscriminator()
    weights = torch.cat([m.weight.flatten() for m in discriminator.modules() if isinstance(m, nn.Conv2d)])
    assert weights.mean().abs() < 1e-3
    torch.testing.assert_close(weights.std(), torch.tensor(0.02), rtol=0.01, atol=0)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_each_side_gets_gradients_from_its_own_loss_only(loss):
    discriminator, generator = small_discriminator(), nn.Conv2d(3, 3, 3, padding=1)
    noise, real = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    parameters = [*generator.parameters(), *discriminator.parameters()]
    split = len(list(generator.parameters()))

    result = gan_losses(discriminator, real, generator(noise), loss)
    (result.generator + result.discriminator).backward()

    # The two textbook steps, each with its own graph.
    of_discriminator, of_generator = LOSSES[loss]
    d_loss = of_discriminator(discriminator(real), discriminator(generator(noise).detach()))
    g_loss = of_generator(discriminator(generator(noise)))
    expected = (
        *torch.autograd.grad(g_loss, parameters[:split]),
        *torch.autograd.grad(d_loss, parameters[split:]),
    )
    for parameter, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    torch.testing.assert_close(result.generator, g_loss)
    torch.testing.assert_close(result.discriminator, d_loss)

    # And neither term alone touches the other side.
    result = gan_losses(discriminator, real, generator(noise), loss)
    grads = torch.autograd.grad(result.generator, parameters, retain_graph=True, allow_unused=True)
    assert all(g is not None for g in grads[:split])
    assert all(g is None for g in grads[split:])
    grads = torch.autograd.grad(result.discriminator, parameters, allow_unused=True)
    assert all(g is None for g in grads[:split])
    assert all(g is not None for g in grads[split:])


def test_adaptive_weight_against_plain_autograd():
    first, last = nn.Linear(4, 5), nn.Linear(5, 3)
    x, target, critic = torch.randn(7, 4), torch.randn(7, 3), nn.Linear(3, 1)

    def norm_at_last_layer(loss_of):
        last.weight.grad = None
        loss_of(last(first(x).tanh())).backward()
        return last.weight.grad.norm()

    def rec(y):
        return (y - target).abs().mean()

    def gan(y):
        return -critic(y).mean()

    expected = norm_at_last_layer(rec) / (norm_at_last_layer(gan) + 1e-4)
    y = last(first(x).tanh())
    weight = adaptive_weight(rec(y), gan(y), last.weight)
    torch.testing.assert_close(weight, expected)
    assert not weight.requires_grad
    (rec(y) + weight * gan(y)).backward()  # both graphs are still there
    y = last(first(x).tanh())
    assert adaptive_weight(rec(y), 1e-12 * gan(y), last.weight, max_weight=5.0) == 5.0


def test_r1_reaches_the_patch_discriminator():
    discriminator = small_discriminator()
    real = torch.randn(2, 3, 32, 32, requires_grad=True)
    r1_penalty(real, discriminator(real)).backward()
    assert discriminator.layers[0].weight.grad.norm() > 0


@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
@pytest.mark.parametrize("weight", [0.5, 0.8])
def test_the_stage_adds_the_terms_as_vqgan_does(compose_run, loss, weight):
    """weight * lambda * L_G + L_D from start_images on, and before it nothing (2012.09841, equations 6 and 7)."""
    from t2i.families.autoencoder.stage import Stage

    arguments = [f"adversarial.loss={loss}", f"adversarial.weight={weight}", "adversarial.start_images=16"]
    stage = Stage(compose_run("experiment=autoencoder/tiny_vq", *arguments))
    real = torch.rand(2, 3, 32, 32) * 2 - 1
    fake = stage.codec.reconstruct(real).image
    l1 = (fake - real).abs().mean()

    for seen in (0, 15):
        stage.images_seen = seen
        assert stage.adversarial_loss(stage.discriminator, real, fake, l1, {}) == 0.0
    stage.images_seen = 16
    metrics = {}
    total = stage.adversarial_loss(stage.discriminator, real, fake, l1, metrics)

    logits_real, logits_fake = stage.discriminator(real), stage.discriminator(fake)
    generator = -logits_fake.mean()
    if loss == "hinge":
        sides = (1 - logits_real).clamp(min=0), (1 + logits_fake).clamp(min=0)
    else:
        sides = -logits_real.sigmoid().log(), -(1 - logits_fake.sigmoid()).log()
    discriminator = 0.5 * (sides[0].mean() + sides[1].mean())
    norms = [
        torch.autograd.grad(term, stage.codec.last_layer, retain_graph=True)[0].norm()
        for term in (l1, generator)
    ]
    adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
    torch.testing.assert_close(metrics["adaptive_weight"], adaptive)
    torch.testing.assert_close(total, weight * adaptive * generator + discriminator)


@pytest.mark.parametrize(("scale", "at_the_limit"), [(1e-3, True), (1.0, False)])
def test_the_stage_adds_the_terms_of_a_kl_codec_as_latent_diffusion_does(compose_run, scale, at_the_limit):
    """CompVis/latent-diffusion, ldm/modules/losses/contperceptual.py: "nll_loss = torch.sum(nll_loss) /
    nll_loss.shape[0]", the KL is a sum too, and "d_weight = torch.clamp(d_weight, 0.0, 1e4).detach()" of the
    gradients of that sum. Here all of it is divided by the values of a picture, which Adam does not see.

    scale: of the discriminator's last layer, so that its gradients are small or large
    """
    from t2i.families.autoencoder.stage import Stage

    arguments = ["adversarial.start_images=0", "codec.kl_weight=1e-3"]
    stage = Stage(compose_run("experiment=autoencoder/tiny_kl", *arguments))
    stage.discriminator.layers[-1].weight.data *= scale
    real = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction = stage.codec.reconstruct(real)
    fake, last = reconstruction.image, stage.codec.last_layer
    metrics = {}
    total = reconstruction.distance + reconstruction.regularizer
    total = total + stage.adversarial_loss(stage.discriminator, real, fake, reconstruction.distance, metrics)

    nll = (real - fake).abs().sum() / len(real)
    kl = stage.codec.posterior(real).kl().sum() / len(real)
    generator = -stage.discriminator(fake).mean()
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, generator)]
    assert (norms[0] / (norms[1] + 1e-4) > 1e4) == at_the_limit
    d_weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
    expected = nll + 1e-3 * kl + 0.5 * d_weight * generator
    torch.testing.assert_close((total - metrics["discriminator"]) * real[0].numel(), expected)
    of_codec = list(stage.codec.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(total, of_codec, retain_graph=True, allow_unused=True),
        torch.autograd.grad(expected, of_codec, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours * real[0].numel(), theirs)


def test_maskgits_recipe(compose_run):
    """Non-saturating losses, a fixed weight of 0.1, and 10 times the squared gradients on real pictures:
    google-research/maskgit, maskgit/libml/losses.py has "penalty = jnp.mean(penalty) * penalty_cost" without a
    half, and configs/vqgan_config.py "grad_penalty_cost = 10.0"."""
    from t2i.families.autoencoder.stage import Stage

    stage = Stage(compose_run("experiment=autoencoder/tiny_fsq", "adversarial=maskgit"))
    real = torch.rand(2, 3, 32, 32) * 2 - 1
    fake = stage.codec.reconstruct(real).image
    metrics = {}
    total = stage.adversarial_loss(stage.discriminator, real, fake, (fake - real).abs().mean(), metrics)

    bce = nn.functional.binary_cross_entropy_with_logits
    logits_real, logits_fake = stage.discriminator(real), stage.discriminator(fake)
    ones, zeros = torch.ones_like(logits_real), torch.zeros_like(logits_real)
    inputs = real.clone().requires_grad_()
    (grad,) = torch.autograd.grad(stage.discriminator(inputs).sum(), inputs)
    sides = bce(logits_real, ones) + bce(logits_fake, zeros)
    expected = 0.1 * bce(logits_fake, ones) + sides + 10 * grad.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(total, expected)
    assert metrics["adaptive_weight"] == 1.0
