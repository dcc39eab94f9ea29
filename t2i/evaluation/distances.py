"""Distances between two sets of pictures, from their features (N, D), all in float64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import linalg
from scipy.linalg import lapack
from torch import Tensor

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's
NEAREST = 5  # neighbours, as prdc and its paper have it
MOST_NEIGHBOURS = 10_000  # pictures of each set that neighbours are looked for among
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK = 1024
STRIPE = 256  # columns


@dataclass(frozen=True)
class Gaussian:
    """mean: (D,), covariance: (D, D) with N - 1 in the denominator, both float64; count: N"""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """features: (N, D), N >= 2. In blocks, so that a copy in float64 is never made of all of them."""
        count, width = features.shape
        mean = features.mean(0, dtype=torch.float64)
        products = torch.zeros(width, width, dtype=torch.float64)
        for block in features.split(8 * BLOCK):
            centred = block.double() - mean
            for start in range(0, width, STRIPE):  # on and above the diagonal alone: about half the work
                stripe = slice(start, start + STRIPE)
                products[stripe, start:].addmm_(centred[:, stripe].T, centred[:, start:])
        covariance = (products.triu() + products.triu(1).T) / (count - 1)
        return cls(mean, covariance, count)

    @cached_property
    def lower(self) -> Tensor | None:
        """Cholesky's factor; None where the rank is not full, as with fewer samples than features."""
        lower, failed = torch.linalg.cholesky_ex(self.covariance)
        return None if failed else lower

    @cached_property
    def factor(self) -> Tensor:
        """(D, R) with factor @ factor.T the covariance of rank R: scaled eigenvectors."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1] * 1e-12
        return vectors[:, kept] * values[kept].sqrt()

    def around(self, covariance: Tensor) -> Tensor:
        """(R, R) factor.T @ covariance @ factor, by whichever factor there is; its lower triangle is what counts. For
        Cholesky's LAPACK has a routine that takes a quarter of the products of full matrices."""
        if self.lower is None:
            return self.factor.T @ covariance @ self.factor
        return torch.from_numpy(
            lapack.dsygst(covariance.T.numpy(), self.lower.numpy(), itype=2, lower=True)[0]
        )


def frechet(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Dowson & Landau 1982; the FID of 1706.08500, equation 6).

    The trace of the root is the sum of the roots of the eigenvalues of S1 S2, which are those of the symmetric L^T S2 L
    with S1 = L L^T: a Cholesky decomposition and a symmetric eigenvalue problem in the place of a matrix root.
    """
    values = linalg.eigvalsh(first.around(second.covariance).numpy(), overwrite_a=True, check_finite=False)
    roots = np.sqrt(values.clip(min=0))
    traces = first.covariance.trace() + second.covariance.trace()
    squared = (first.mean - second.mean).square().sum() + traces - 2 * float(roots.sum())
    return float(squared.clamp_min(0))  # rounding can bring it below


def kid(
    generated: Tensor, real: Tensor, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE
) -> tuple[float, float]:
    """The kernel inception distance (Bińkowski et al., 1801.01401): mean and standard deviation over subsets of the
    unbiased squared MMD with the kernel (x y / D + 1)^3. The subsets are those that torch-fidelity draws, of at most as
    many as there are."""
    random = np.random.RandomState(KID_SEED)
    size = min(subset_size, len(generated), len(real))
    values = []
    for _ in range(subsets):
        x, y = (each[random.choice(len(each), size, replace=False)].double() for each in (generated, real))
        width = x.shape[1]
        own = sum(kernel.sum() - kernel.trace() for kernel in ((z @ z.T / width + 1) ** 3 for z in (x, y)))
        across = ((x @ y.T / width + 1) ** 3).sum()
        values.append(float(own / (size * (size - 1)) - 2 * across / size**2))
    return float(np.mean(values)), float(np.std(values))


def cmmd(generated: Tensor, real: Tensor) -> float:
    """CLIP's maximum mean discrepancy (Jayasumana et al., 2401.09603): the squared MMD with the Gaussian kernel of
    sigma 10 over CLIP vectors of length 1, its diagonal included as in their code, times 1,000."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for rows in a.split(BLOCK):
            for columns in b.split(BLOCK):
                square = _squares(rows.double(), columns.double())
                total += torch.exp(-square / (2 * CMMD_SIGMA**2)).sum()
        return total / (len(a) * len(b))

    return CMMD_SCALE * float(mean(generated, generated) + mean(real, real) - 2 * mean(generated, real))


@dataclass(frozen=True)
class Manifolds:
    """precision, recall: shares of pictures within reach of the other set (Kynkäänniemi et al., 1904.06991); density,
    coverage: their forms that single odd pictures do not move (Naeem et al., 2002.09797)"""

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(generated: Tensor, real: Tensor) -> Manifolds:
    """As the package prdc has them: a ball reaches to the NEAREST-th neighbour, its border left out. Of more than
    MOST_NEIGHBOURS pictures the first ones."""
    generated, real = (each[:MOST_NEIGHBOURS].double() for each in (generated, real))
    of_real, of_generated = _reach(real), _reach(generated)
    hit = torch.zeros(len(generated), dtype=torch.int64)  # by how many real balls
    reached = covered = 0
    for start in range(0, len(real), BLOCK):
        rows = slice(start, start + BLOCK)
        distance = _squares(real[rows], generated)
        hit += (distance < of_real[rows, None]).sum(0)
        reached += int((distance < of_generated).any(1).sum())
        covered += int((distance.min(1).values < of_real[rows]).sum())
    return Manifolds(
        precision=float((hit > 0).double().mean()),
        recall=reached / len(real),
        density=float(hit.double().mean()) / NEAREST,
        coverage=covered / len(real),
    )


def _reach(features: Tensor) -> Tensor:
    """(N,) squared distances to the NEAREST-th neighbour; each is the first of its own."""
    parts = []
    for start in range(0, len(features), BLOCK):
        square = _squares(features[start : start + BLOCK], features)
        rows = torch.arange(len(square))
        square[rows, start + rows] = 0.0
        parts.append(square.kthvalue(NEAREST + 1).values)
    return torch.cat(parts)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) squared distances between the rows of (N, D) and (M, D)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def halves(count: int, rounds: int) -> list[Tensor]:
    """Random halves of `count` samples, always the same ones: (count // 2,) int64 each. The standard deviation of an
    estimate over them is the one that it has over samples of `count` (Politis & Romano 1994; the delete-half
    jackknife). Samples are drawn without putting back: where some came twice, as in the usual bootstrap, neighbours
    and covariances would be others."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(count, generator=generator)[: count // 2] for _ in range(rounds)]
