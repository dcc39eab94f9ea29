"""Adversarial losses and penalties: closed forms and gradients."""

import pytest
import torch
from torch import nn

from t2i.adversarial.losses import (
    frozen_forward,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    r1_penalty,
    vanilla_discriminator_loss,
)

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_losses_in_closed_form():
    real, fake = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([-3.0, 0.0, 1.0])
    torch.testing.assert_close(hinge_discriminator_loss(real, fake), torch.tensor((2.5 / 3 + 3.0 / 3) / 2))
    torch.testing.assert_close(hinge_generator_loss(fake), torch.tensor(2.0 / 3))
    bce = nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (bce(real, torch.ones(3)) + bce(fake, torch.zeros(3)))
    torch.testing.assert_close(vanilla_discriminator_loss(real, fake), expected)
    torch.testing.assert_close(non_saturating_discriminator_loss(real, fake), 2 * expected)
    torch.testing.assert_close(non_saturating_generator_loss(fake), bce(fake, torch.ones(3)))


def test_frozen_forward_is_the_forward_with_constant_parameters():
    module, x = nn.Bilinear(3, 3, 2), torch.randn(2, 3, requires_grad=True)
    expected = module(x, x)
    (dx,) = torch.autograd.grad(expected.sum(), x)
    out = frozen_forward(module, x, x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(x.grad, dx)
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_r1_of_a_linear_discriminator():
    discriminator = nn.Linear(12, 2)
    real = torch.randn(5, 12, requires_grad=True)
    penalty = r1_penalty(real, discriminator(real))
    expected = discriminator.weight.sum(dim=0).square().sum()  # the gradient is the same for every picture
    torch.testing.assert_close(penalty, expected)
    (grad,) = torch.autograd.grad(penalty, discriminator.weight)
    (expected_grad,) = torch.autograd.grad(expected, discriminator.weight)
    torch.testing.assert_close(grad, expected_grad)


def test_r1_of_a_quadratic_discriminator():
    scale = torch.tensor(1.5, requires_grad=True)
    real = torch.randn(4, 3, 2, 2, requires_grad=True)
    penalty = r1_penalty(real, (scale * real.square()).flatten(1).sum(dim=1))
    torch.testing.assert_close(penalty, (2 * scale * real).square().flatten(1).sum(dim=1).mean())
