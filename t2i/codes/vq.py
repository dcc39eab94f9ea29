"""The vector-quantisation codebook, learned by exponential moving averages (van den Oord et al., 1711.00937,
appendix A.1; Razavi et al., 1906.00446), with restarts of dead codes (Dhariwal et al., 2005.00341).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
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


class Codebook(Quantizer):
    """Replaces each position's vector by the nearest of `num_codes` codes (squared L2).

    All state is in buffers, so a state dict resumes exactly; no code is a parameter. Updates happen in
    training mode. Under torch.distributed a training step sums the statistics over the ranks (those of
    `Quantized` too), and codebooks stay equal on all ranks.

    ema_decay: gamma of 1711.00937, equation 6, per training step
    commitment_weight: beta of 1711.00937, equation 3
    normalize: vectors and codes are brought to length 1 where they are used, so that the nearest code is that of the
        largest cosine (ViT-VQGAN: 2110.04627, section 3.2); `codes` may have any length
    restart_below: a code is dead when its averaged use falls below this share of uniform use. A dead code
        takes the place of one of the current batch's vectors. In the first batch every code is dead, and the
        restart is the initialisation.
    entropy_weight: of E[H(q)] - H(E[q]) in nats, q the softmax of -||z - e||^2 / entropy_temperature over the codes e:
        each position sure of its code, all codes used alike (the entropy loss in the published code of MaskGIT and
        MAGVIT). Only the encoder learns from it; it takes the memory of a number for each code at each position
    """

    codes: Tensor
    cluster_size: Tensor
    cluster_sum: Tensor
    steps: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        ema_decay: float = 0.99,
        commitment_weight: float = 0.25,
        restart_below: float = 0.5,
        normalize: bool = False,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        self.num_codes, self.in_channels, self.code_dim = num_codes, dim, dim
        self.ema_decay = ema_decay
        self.commitment_weight = commitment_weight
        self.restart_below = restart_below
        self.normalize = normalize
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.register_buffer("codes", torch.randn(num_codes, dim))
        self.register_buffer("cluster_size", torch.zeros(num_codes))  # N_i
        self.register_buffer("cluster_sum", torch.zeros(num_codes, dim))  # m_i
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, latent: Tensor, noise: Tensor | None = None, images_seen: int = 0) -> Quantized:
        """latent: (B, D, h, w) float. Distances and averages are computed in float32 at least, autocast or not (in
        TF32 where a GPU trains in 32-true)."""
        batch, dim, height, width = latent.shape
        with without_autocast(latent.device):
            z = self._vectors(latent)
            vectors = z.detach().permute(0, 2, 3, 1).reshape(-1, dim)
            averages = (self.codes, self.cluster_size, self.cluster_sum)
            before = [buffer.clone() for buffer in averages] if self.training else []
            dead = self._restart(vectors, height * width) if self.training else None
            flat_indices = self._nearest(vectors)
            indices = flat_indices.view(batch, height, width)
            quantized = self.lookup(indices)
            # 1711.00937, equation 3, third term: the codes are averages, and learn from no gradient.
            loss = self.commitment_weight * F.mse_loss(z, quantized)
            metrics: dict[str, Tensor] = {}
            if self.entropy_weight:
                of_each, of_all = self.entropies(z)
                loss = loss + self.entropy_weight * (of_each - of_all)
                metrics = {"entropy_of_each": of_each.detach(), "entropy_of_all": of_all.detach()}
            counts = code_counts(flat_indices, self.num_codes, self.cluster_size.dtype)
            if dead is not None:
                counts = self._update(vectors, flat_indices, counts, dead)
                # A batch that is not finite on one rank is in the sums of all, and in no code.
                finite = torch.stack([buffer.isfinite().all() for buffer in averages]).all()
                for buffer, old in zip(averages, before, strict=True):
                    buffer.copy_(torch.where(finite, buffer, old))
            usage, perplexity = code_use(counts)
            return Quantized(
                latent=z + (quantized - z).detach(),
                indices=indices,
                loss=loss,
                usage=usage,
                perplexity=perplexity,
                metrics=metrics,
            )

    def indices(self, latent: Tensor) -> Tensor:
        """(B, D, h, w) float -> (B, h, w) int64, the nearest codes; learns nothing."""
        with without_autocast(latent.device):
            vectors = self._vectors(latent).movedim(1, -1)
            return self._nearest(vectors.flatten(0, 2)).view(vectors.shape[:3])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 in [0, num_codes) -> (B, D, h, w)."""
        return F.embedding(indices, self._directions()).permute(0, 3, 1, 2)

    def entropies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """E[H(q)] and H(E[q]), scalars in nats; z: (B, D, h, w). In training the mean is over all ranks."""
        # A copy: those that the step's averages go on from change before the backward pass.
        codes = self._directions().clone()
        logits = -self._distance(z.movedim(1, -1).flatten(0, 2), codes) / self.entropy_temperature
        q = logits.softmax(dim=1)
        of_each = -(q * logits.log_softmax(dim=1)).sum(dim=1).mean()
        return of_each, entropy(mean_share(q, self.training))

    def _vectors(self, latent: Tensor) -> Tensor:
        return F.normalize(widened(latent), dim=1) if self.normalize else widened(latent)

    def _directions(self) -> Tensor:
        return F.normalize(self.codes) if self.normalize else self.codes

    def _nearest(self, vectors: Tensor) -> Tensor:
        return self._distance(vectors, self._directions()).argmin(dim=1)

    @staticmethod
    def _distance(vectors: Tensor, codes: Tensor) -> Tensor:
        """(N, D) and (K, D) -> (N, K): ||z - e||^2 less ||z||^2, which is the same for all codes."""
        return codes.square().sum(dim=1) - 2.0 * vectors @ codes.T

    def _restart(self, vectors: Tensor, per_picture: int) -> Tensor:
        """Gives dead codes a vector of this batch, of all ranks; returns which were dead, (num_codes,) bool.

        Written without a branch on device values (the host never waits) and without random numbers: code i of
        step t takes the vector at frac((t * num_codes + i) * golden ratio) of the batch, in Knuth's integer
        form. Such points are evenly spread and aligned with no image grid.
        """
        dead = self.cluster_size <= self.restart_below * self.cluster_size.mean()
        together = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        place = (self.steps * len(self.codes) + torch.arange(len(self.codes), device=vectors.device)) % 2**31
        place = (place * 2654435761 % 2**32 * (len(vectors) * world)) >> 32
        # Picture i of the step's batch is with rank i % world (`t2i.data.order`).
        picture, within = place // per_picture, place % per_picture
        candidates = vectors[picture // world * per_picture + within]
        if together:
            candidates = torch.where((picture % world == rank)[:, None], candidates, 0.0)
            dist.all_reduce(candidates)
        self.codes.copy_(torch.where(dead[:, None], candidates, self.codes))
        return dead

    def _update(self, vectors: Tensor, indices: Tensor, counts: Tensor, dead: Tensor) -> Tensor:
        """One step of the averages; returns the counts of all ranks. A restarted code starts as if it had
        been used as often as the average code, so that it has time to find its cluster."""
        sums = torch.zeros_like(self.codes).index_add_(0, indices, vectors)
        summed(counts)
        summed(sums)
        share = counts.sum() / len(counts)
        size = torch.where(dead, share, self.cluster_size)
        total = torch.where(dead[:, None], share * self.codes, self.cluster_sum)
        self.cluster_size.copy_(size.lerp(counts, 1.0 - self.ema_decay))
        self.cluster_sum.copy_(total.lerp(sums, 1.0 - self.ema_decay))
        codes = self.cluster_sum / self.cluster_size[:, None]
        # A code whose use has fallen to nothing (0 / 0) stays where it is until it is restarted.
        self.codes.copy_(torch.where(self.cluster_size[:, None] > 0, codes, self.codes))
        self.steps.add_(1)
        return counts
