"""Adversarial losses of the autoencoders (Esser et al., 2012.09841; Rombach et al., 2112.10752).

The generator and the discriminator are trained by one backward pass: `gan_losses` gives one term for each,
and neither term reaches the other's parameters. So one DDP reduction serves both, and no parameter is ever
unused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.nn.precision import widened


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Scalar: half the mean hinge of both sides (Lim & Ye, 1705.02894; the half is VQGAN's)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Scalar: half the binary cross-entropy of both sides (Goodfellow et al., 1406.2661)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def hinge_generator_loss(logits_fake: Tensor) -> Tensor:
    """Scalar: -mean D(fake); VQGAN uses it with either discriminator loss."""
    return -logits_fake.mean()


def r1_penalty(real: Tensor, logits: Tensor) -> Tensor:
    """Scalar: E ||grad_x D(x)||^2 over real pictures (Mescheder et al., 1801.04406, equation 9); the factor
    gamma / 2 is the caller's. A picture's patch logits are summed.

    real: (B, ...) with requires_grad; logits: the discriminator's, computed from `real`.
    """
    (grad,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return grad.flatten(1).square().sum(dim=1).mean()


def adaptive_weight(
    reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor, max_weight: float = 1e4
) -> Tensor:
    """Scalar without gradient: ||grad L_rec|| / (||grad L_gan|| + 1e-4) at the decoder's last layer, at most
    `max_weight` (2012.09841, equation 7, with VQGAN's delta and limit).

    Under torch.distributed the gradients are averaged over the ranks before their norms are taken, so that
    every rank has the weight that one process would have for the whole batch. Both graphs are kept.
    """
    losses = (reconstruction_loss, generator_loss)
    grads = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(grads)
        grads = grads / dist.get_world_size()
    rec_norm, gan_norm = widened(grads).flatten(1).norm(dim=1)
    return (rec_norm / (gan_norm + 1e-4)).clamp(max=max_weight).detach()


def frozen_forward(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) with its parameters taken as constants: gradients reach x and nothing else."""
    constants = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, constants, (x,))


@dataclass(frozen=True)
class GanLosses:
    """Two scalars to be added into one total, and detached means for the log.

    generator: gradients reach the fake pictures only
    discriminator: gradients reach the discriminator's parameters only
    """

    generator: Tensor
    discriminator: Tensor
    mean_logit_real: Tensor
    mean_logit_fake: Tensor


def gan_losses(
    discriminator: nn.Module,
    real: Tensor,
    fake: Tensor,
    discriminator_loss: Callable[[Tensor, Tensor], Tensor] = hinge_discriminator_loss,
) -> GanLosses:
    """Both sides of the game, for real and fake pictures (B, 3, H, W) in [-1, 1]."""
    generator = hinge_generator_loss(frozen_forward(discriminator, fake))
    logits_real, logits_fake = discriminator(torch.cat([real, fake]).detach()).chunk(2)
    return GanLosses(
        generator=generator,
        discriminator=discriminator_loss(logits_real, logits_fake),
        mean_logit_real=logits_real.detach().mean(),
        mean_logit_fake=logits_fake.detach().mean(),
    )
