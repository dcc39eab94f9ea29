"""Lookup-free quantisation: a code is the signs of its channels (Yu et al., 2310.05737, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.codes.quantizer import (
    Quantized,
    Quantizer,
    code_counts,
    code_use,
    entropy,
    mean_share,
    summed,
)
from t2i.nn.precision import widened, without_autocast

GROUP_BITS = 10  # the entropy of the mean is exact up to 1,024 codes


class LFQ(Quantizer):
    """Each channel becomes its sign, -1 or 1 (0 is -1); the index is sum_i 2^i [z_i > 0]. Nothing is kept.

    The loss is commitment_weight * ||z - sign(z)||^2 (mean over all elements) and entropy_weight *
    (E[H(q(z))] - H(E[q(z)])) in nats (equation 5 there): each position sure of its code, all codes used alike.
    q(z) is the softmax of -||z - c||^2 / entropy_temperature over the codes c: of independent bits, so that the first
    entropy is a sum over them. The second is that over all codes together where there are at most 2^GROUP_BITS; more
    bits are cut into groups, whose entropies are added (at least that of all together).

    num_codes: a power of two; C = D = log2(num_codes)
    """

    one: Tensor

    def __init__(
        self,
        num_codes: int,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        commitment_weight: float = 0.25,
    ) -> None:
        super().__init__()
        bits = num_codes.bit_length() - 1
        self.num_codes, self.in_channels, self.code_dim = num_codes, bits, bits
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.commitment_weight = commitment_weight
        # In the dtype of the weights, whatever that is changed to.
        self.register_buffer("one", torch.ones(()), persistent=False)

    def forward(self, latent: Tensor, noise: Tensor | None = None, images_seen: int = 0) -> Quantized:
        with without_autocast(latent.device):
            z = widened(latent)
            indices = self.indices(z)
            signs = torch.where(z.detach() > 0, 1.0, -1.0).to(z)
            counts = code_counts(indices, self.num_codes, z.dtype)
            usage, perplexity = code_use(summed(counts) if self.training else counts)
            of_each, of_all = self.entropies(z)
            loss = self.entropy_weight * (of_each - of_all) + self.commitment_weight * F.mse_loss(z, signs)
            return Quantized(
                latent=z + (signs - z).detach(),
                indices=indices,
                loss=loss,
                usage=usage,
                perplexity=perplexity,
                metrics={"entropy_of_each": of_each.detach(), "entropy_of_all": of_all.detach()},
            )

    def indices(self, latent: Tensor) -> Tensor:
        powers = 2 ** torch.arange(self.in_channels, device=latent.device)
        return ((latent > 0) * powers.view(-1, 1, 1)).sum(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        bits = indices[:, None] >> torch.arange(self.in_channels, device=indices.device).view(-1, 1, 1) & 1
        return (2 * bits - 1) * self.one

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """E[H(q(z))] and H(E[q(z)]), scalars in nats; z: (B, C, h, w). In training the mean is over all ranks."""
        # ||z + 1||^2 - ||z - 1||^2 = 4 z, of one channel.
        logits = 4.0 * z.movedim(1, -1).flatten(0, 2) / self.entropy_temperature
        p = torch.sigmoid(logits)
        # H of a bit, where p or 1 - p may be 0 to the last digit.
        of_each = (F.softplus(logits) - p * logits).sum(dim=1).mean()
        of_all = z.new_zeros(())
        for group in p.split(GROUP_BITS, dim=1):
            joint = torch.ones_like(group[:, :1])
            for bit in group.split(1, dim=1):
                joint = torch.cat([joint * (1 - bit), joint * bit], dim=1)
            of_all = of_all + entropy(mean_share(joint, self.training))
        return of_each, of_all
