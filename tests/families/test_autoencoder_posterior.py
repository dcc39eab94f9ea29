"""The diagonal Gaussian posterior against torch.distributions and diffusers."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from t2i.families.autoencoder.posterior import DiagonalGaussian

pytestmark = pytest.mark.usefixtures("float64")


def moments() -> torch.Tensor:
    return 2 * torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(0))


def test_kl_equals_torch_distributions():
    mean, logvar = moments().chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(DiagonalGaussian(moments()).kl(), expected)


def test_equals_diffusers():
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    wild = 30 * moments()  # beyond both ends of the clamp
    ours, theirs = DiagonalGaussian(wild), DiagonalGaussianDistribution(wild)
    torch.testing.assert_close(ours.kl(), theirs.kl())
    torch.testing.assert_close(ours.mode(), theirs.mode())
    sample = ours.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample, theirs.sample(torch.Generator().manual_seed(1)))


def test_sample_statistics_and_gradient():
    mean, logvar = torch.tensor(1.5), torch.tensor(-1.0)
    x = torch.stack([mean, logvar]).view(1, 2, 1, 1).expand(1, 2, 200, 200).clone().requires_grad_()
    sample = DiagonalGaussian(x).sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample.mean(), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(sample.std(), (logvar / 2).exp(), rtol=0, atol=0.02)
    sample.sum().backward()
    assert torch.equal(x.grad[:, 0], torch.ones(1, 200, 200))
    torch.testing.assert_close(x.grad[:, 1], 0.5 * (sample - mean)[:, 0].detach())


def test_half_precision_moments_are_widened():
    posterior = DiagonalGaussian(moments().bfloat16())
    assert posterior.sample().dtype == posterior.kl().dtype == torch.float32
