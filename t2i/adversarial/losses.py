"""Losses of generative adversarial networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Scalar: half the mean hinge of both sides (Lim & Ye, 1705.02894; the half is VQGAN's)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Scalar: half the binary cross-entropy of both sides (Goodfellow et al., 1406.2661)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def hinge_generator_loss(logits_fake: Tensor) -> Tensor:
    """Scalar: -mean D(fake); VQGAN uses it with either discriminator loss."""
    return -logits_fake.mean()


def non_saturating_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Scalar: the binary cross-entropies of both sides, added (1406.2661; MaskGIT's: 2202.04200)."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def non_saturating_generator_loss(logits_fake: Tensor) -> Tensor:
    """Scalar: -mean log sigmoid(D(fake)) (1406.2661, section 3)."""
    return F.softplus(-logits_fake).mean()


def r1_penalty(real: Tensor, logits: Tensor) -> Tensor:
    """Scalar: E ||grad_x D(x)||^2 over real pictures (Mescheder et al., 1801.04406, equation 9); the factor
    gamma / 2 is the caller's. A picture's patch logits are summed.

    real: (B, ...) with requires_grad; logits: the discriminator's, computed from `real`.
    """
    (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return grad.flatten(1).square().sum(dim=1).mean()


def frozen_forward(module: nn.Module, *inputs: Tensor) -> Tensor:
    """module(*inputs) with its parameters taken as constants: gradients reach the inputs and nothing else."""
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, constants, inputs)
