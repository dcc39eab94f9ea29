"""Distances between sets of features, against the field's own tools and closed forms."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_frechet
from cleanfid.fid import kernel_distance
from prdc import compute_prdc
from scipy import linalg
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from t2i.evaluation.distances import Gaussian, cmmd, frechet, halves, kid, manifolds
from t2i.evaluation.features import Extractor
from t2i.evaluation.measure import figures
from t2i.evaluation.statistics import Statistics


def two_sets(count: int, other: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features with means apart, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    first, second = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (count, other))
    return first @ mix, second @ (mix + 0.2 * torch.eye(width)) + 0.3


def test_the_gaussian_is_numpys_mean_and_covariance():
    features, _ = two_sets(9000, 2, 300)  # more than one block and stripe
    found = Gaussian.of(features)
    torch.testing.assert_close(found.mean, torch.from_numpy(np.mean(features.numpy(), axis=0)))
    torch.testing.assert_close(found.covariance, torch.from_numpy(np.cov(features.numpy(), rowvar=False)))


def test_frechet_of_gaussians_with_diagonal_covariances():
    """|m1 - m2|^2 + sum (s1 - s2)^2"""
    means = torch.tensor([[0.0, 1.0], [2.0, 0.5]], dtype=torch.float64)
    deviations = torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=torch.float64)
    first, second = (Gaussian(m, torch.diag(s**2), 10) for m, s in zip(means, deviations, strict=True))
    expected = float((means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum())
    assert frechet(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("count", "other"), [(300, 200), (30, 200), (30, 20)])
def test_frechet_is_torch_fidelitys_and_clean_fids(monkeypatch, count, other):
    """Also where there are fewer samples than the 64 features."""
    first, second = two_sets(count, other, 64)
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), False
    )["frechet_inception_distance"]
    found = frechet(Gaussian.of(first), Gaussian.of(second))
    assert found == pytest.approx(expected, rel=1e-4)
    if min(count, other) > 64:  # theirs adds to the diagonal where a matrix is singular
        theirs = [Gaussian.of(each) for each in (first, second)]
        arguments = [part.numpy() for each in theirs for part in (each.mean, each.covariance)]
        # scipy 1.18's root has no `disp`, which clean-fid gives it, and no second result.
        root = linalg.sqrtm
        monkeypatch.setattr(linalg, "sqrtm", lambda matrix, disp: (root(matrix), None))
        assert found == pytest.approx(cleanfid_frechet(*arguments), rel=1e-8)


def test_a_set_has_no_distance_to_itself():
    features, _ = two_sets(50, 2, 8)
    assert frechet(Gaussian.of(features), Gaussian.of(features)) == pytest.approx(0, abs=1e-9)


def test_kid_is_torch_fidelitys_on_its_subsets():
    first, second = two_sets(150, 130, 16)
    expected = kid_features_to_metric(
        first, second, kid_subsets=7, kid_subset_size=50, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, rng_seed=2020, verbose=False,
    )  # fmt: skip
    found = kid(first, second, subsets=7, subset_size=50)
    assert found == pytest.approx(tuple(expected.values()), rel=1e-9)


def test_kid_of_all_samples_is_clean_fids():
    first, second = (each[:60] for each in two_sets(60, 60, 16))
    found, spread = kid(first, second, subsets=1)
    assert found == pytest.approx(kernel_distance(first.numpy(), second.numpy(), num_subsets=1), rel=1e-9)
    assert spread == 0


def test_cmmd_is_the_mean_kernel_over_all_pairs():
    first, second = (torch.nn.functional.normalize(each) for each in two_sets(1100, 20, 4))  # two blocks

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.exp(-(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / 200).mean()

    expected = 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))
    assert cmmd(first, second) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("sizes", [(40, 60), (1100, 70), (70, 1100)])
def test_precision_recall_density_and_coverage_are_prdcs(sizes):
    generated, real = two_sets(*sizes, 6)
    expected = compute_prdc(real.numpy(), generated.numpy(), nearest_k=5)
    assert vars(manifolds(generated, real)) == pytest.approx(expected, abs=1e-12)


def test_halves_tell_the_deviation_over_samples():
    """Of a mean it is known: s / sqrt(N)."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = statistics.stdev(float(values[half].mean()) for half in halves(400, 300))
    assert found == pytest.approx(float(values.std()) / 20, rel=0.15)
    assert all(len(half.unique()) == 200 for half in halves(400, 3))


def test_an_interval_of_a_share_lies_within_0_and_1():
    """A few of the pictures are far off, so that the halves' shares differ."""
    generator = torch.Generator().manual_seed(0)
    near, far, real = (torch.randn(count, 4, generator=generator) for count in (40, 4, 40))
    features = torch.cat([near, 50 + far])
    network = Extractor("inception", "a network", 4, "clean", "", "FID", lambda pictures: pictures)
    reference = Statistics(real, Gaussian.of(real), {})
    found = {each.name: each for each in figures(network, features, reference, rounds=8)}
    for name in ("precision", "recall", "coverage"):
        low, high = found[name].interval_95
        assert 0 <= low <= found[name].value <= high <= 1
    assert found["coverage"].interval_95[1] == 1  # it would be above
