"""What a step draws depends on the seed, the sample's position and the purpose, and on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from t2i.data.order import hash64
from t2i.training.randomness import Randomness, _hashed


def random_of(positions: range, seed: int = 3, dtype: torch.dtype = torch.float64) -> Randomness:
    return Randomness(seed, torch.tensor(list(positions)), dtype)


@pytest.mark.parametrize("draw", [Randomness.normal, Randomness.uniform])
def test_the_batch_and_its_split_change_nothing(draw):
    whole = draw(random_of(range(40, 48)), "noise", 3, 5)
    assert whole.shape == (8, 3, 5)
    assert torch.equal(
        torch.cat([draw(random_of(range(i, i + 2)), "noise", 3, 5) for i in (40, 42, 44, 46)]), whole
    )
    shuffled = draw(Randomness(3, torch.tensor([47, 40]), torch.float64), "noise", 3, 5)
    assert torch.equal(shuffled, whole[[7, 0]])


@pytest.mark.parametrize("draw", [Randomness.normal, Randomness.uniform])
def test_seed_position_and_purpose_change_all(draw):
    base = draw(random_of(range(64)), "noise", 100).flatten()
    others = {
        "seed": draw(random_of(range(64), seed=4), "noise", 100),
        "a seed beyond 64 bits": draw(random_of(range(64), seed=3 + 2**64), "noise", 100),
        "position": draw(random_of(range(64, 128)), "noise", 100),
        "purpose": draw(random_of(range(64)), "time", 100),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base, other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(6400), name


def test_asked_again_the_same_comes():
    random = random_of(range(4))
    assert torch.equal(random.normal("noise", 7), random.normal("noise", 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions(dtype):
    """Kolmogorov and Smirnov's distance of 300,000 numbers, at a chance of 1e-9; and the first moments."""
    random = random_of(range(3000), dtype=dtype)
    limit = math.sqrt(math.log(2e9) / 2 / 300_000)
    for drawn, cdf in (
        (random.uniform("u", 100), lambda x: x),
        (random.normal("n", 100), torch.special.ndtr),
    ):
        assert drawn.dtype == dtype
        share = cdf(drawn.double().flatten().sort().values)
        steps = torch.arange(300_001).double() / 300_000
        assert max((share - steps[:-1]).abs().max(), (share - steps[1:]).abs().max()) < limit
    uniform, normal = random.uniform("u", 100), random.normal("n", 100).double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert normal.mean().abs() < 6 / math.sqrt(300_000)
    assert (normal.var() - 1).abs() < 6 * math.sqrt(2 / 300_000)
    assert 4 < normal.abs().max() < 7


def test_numbers_of_one_sample_are_independent_of_its_neighbours():
    normal = random_of(range(2000)).normal("n", 50)
    along, across = normal[:, :-1] * normal[:, 1:], normal[:-1] * normal[1:]
    for products in (along, across, normal[:, :25] * normal[:, 25:]):
        assert products.mean().abs() < 6 / math.sqrt(products.numel())


def test_the_hash_is_that_of_the_data_order():
    """SplitMix64's finaliser, in numpy's unsigned integers and in torch's signed ones."""
    values = np.array([0, 1, 2, 12345, 2**63 - 1, 2**64 - 1], dtype=np.uint64)
    ours = _hashed(torch.from_numpy(values.view(np.int64)))
    assert np.array_equal(ours.numpy().view(np.uint64), np.concatenate([hash64(int(v)) for v in values]))


def test_one_number_and_an_odd_count():
    assert random_of(range(3)).uniform("t").shape == (3,)
    assert random_of(range(3)).normal("n", 3).shape == (3, 3)
