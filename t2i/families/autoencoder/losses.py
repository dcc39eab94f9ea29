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
from torch import Tensor, nn

from t2i.adversarial.losses import (
    frozen_forward,
    hinge_discriminator_loss,
    hinge_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    vanilla_discriminator_loss,
)
from t2i.nn.precision import widened

GRADIENT_SCALE = 2.0**10  # a power of two: but for float16 it changes no bit
MAX_ADAPTIVE_WEIGHT = 1e4
# adversarial.loss -> the discriminator's and the generator's.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hinge": (hinge_discriminator_loss, hinge_generator_loss),
    "vanilla": (vanilla_discriminator_loss, hinge_generator_loss),
    "non_saturating": (non_saturating_discriminator_loss, non_saturating_generator_loss),
}


def adaptive_weight(
    reconstruction_loss: Tensor,
    generator_loss: Tensor,
    last_layer: Tensor,
    max_weight: float = MAX_ADAPTIVE_WEIGHT,
) -> Tensor:
    """Scalar without gradient: ||grad L_rec|| / (||grad L_gan|| + 1e-4) at the decoder's last layer, at most
    `max_weight` (2012.09841, equation 7, with VQGAN's delta and limit).

    Under torch.distributed the gradients are averaged over the ranks before their norms are taken, so that
    every rank has the weight that one process would have for the whole batch. Both graphs are kept.
    """
    # Of a mean over millions of values each has a gradient that is 0 in float16: no scaler has its hand in this pass.
    losses = (GRADIENT_SCALE * reconstruction_loss, GRADIENT_SCALE * generator_loss)
    grads = torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses])
    grads = grads / GRADIENT_SCALE
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(grads)
        grads = grads / dist.get_world_size()
    rec_norm, gan_norm = widened(grads).flatten(1).norm(dim=1)
    return (rec_norm / (gan_norm + 1e-4)).clamp(max=max_weight).detach()


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


def gan_losses(discriminator: nn.Module, real: Tensor, fake: Tensor, loss: str = "hinge") -> GanLosses:
    """Both sides of the game, for real and fake pictures (B, 3, H, W) in [-1, 1]; loss: one of LOSSES."""
    discriminator_loss, generator_loss = LOSSES[loss]
    generator = generator_loss(frozen_forward(discriminator, fake))
    logits_real, logits_fake = discriminator(torch.cat([real, fake]).detach()).chunk(2)
    return GanLosses(
        generator=generator,
        discriminator=discriminator_loss(logits_real, logits_fake),
        mean_logit_real=logits_real.detach().mean(),
        mean_logit_fake=logits_fake.detach().mean(),
    )
