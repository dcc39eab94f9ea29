"""The best of several pictures, by a score that is known."""

from __future__ import annotations

import pytest
import torch

from t2i.errors import ConfigError
from t2i.generation.reranking import Reranked
from t2i.interfaces import SampleRequest


class Flat:
    """Draws pictures of one value each: a number that its seed alone decides; those of `broken` are not finite."""

    default_size_px, precision, sampling = 4, "32-true", None

    def __init__(self, broken: set[int] | None = None) -> None:
        self.seeds: list[int] = []
        self.broken = broken or set()

    def value(self, seed: int) -> float:
        return torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()

    def check(self, request, sampling):
        pass

    def generate(self, request, progress=None):
        self.seeds += request.seeds
        values = [torch.nan if seed in self.broken else self.value(seed) for seed in request.seeds]
        return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4)


def score(images, prompts):
    """A prompt "low" wants dark pictures."""
    signs = torch.tensor([-1.0 if prompt == "low" else 1.0 for prompt in prompts])
    return signs * images.mean((1, 2, 3))


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_picture_with_the_highest_score_is_kept(count):
    plain = Flat()
    request = SampleRequest(["high", "low"], [0, 3], 4, 4)
    images = Reranked(plain, count, score).generate(request)
    own = [[plain.value(seed * count + i) for i in range(count)] for seed in (0, 3)]
    assert images[:, 0, 0, 0].tolist() == [pytest.approx(max(own[0])), pytest.approx(min(own[1]))]
    assert plain.seeds == [*range(count), *range(3 * count, 4 * count)]
    alone = Reranked(Flat(), count, score).generate(request.rows([1]))
    assert torch.equal(images[1:], alone)


def test_one_that_is_not_finite_is_kept_last():
    best = max(range(4), key=Flat().value)
    request = SampleRequest(["high"], [0], 4, 4)
    others = [Flat().value(i) for i in range(4) if i != best]
    assert Reranked(Flat({best}), 4, score).generate(request)[0, 0, 0, 0].item() == pytest.approx(max(others))
    assert Reranked(Flat({0, 1, 2, 3}), 4, score).generate(request).isnan().all()


def test_noise_of_one_picture_is_no_place_to_begin_several():
    request = SampleRequest(["high"], [0], 4, 4, noise=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="--rerank is 4; allowed: without --invert"):
        Reranked(Flat(), 4, score).generate(request)
