"""The nearest-picture judge: perfect on real pictures, at chance on shuffled ones."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from t2i.evaluation.nearest import NearestJudge
from t2i.evaluation.prompts import PromptScore, score

VALUES = {"occupation": "abcde", "gender": "mwp", "tone": "123456"}
ATTRIBUTES = [dict(zip(VALUES, words, strict=True)) for words in itertools.product(*VALUES.values())]


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    """90 pictures, each the sum of one smooth pattern for each of its attributes."""
    generator = torch.Generator().manual_seed(0)
    patterns = {
        (name, value): F.interpolate(torch.randn(1, 3, 4, 4, generator=generator), size=32)[0]
        for name, values in VALUES.items()
        for value in values
    }
    pictures = [sum(patterns[item] for item in words.items()) for words in ATTRIBUTES]
    return (0.3 * torch.stack(pictures)).clamp(-1, 1)


def shares(real: torch.Tensor, images: torch.Tensor, wanted: list[dict[str, str]]) -> PromptScore:
    """How often the nearest of the real pictures has what was wanted."""
    shown = NearestJudge(real, ATTRIBUTES).predict(images)
    return score([{k: s[k] == v for k, v in w.items()} for s, w in zip(shown, wanted, strict=True)])


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_real_pictures_are_recognised_despite_noise(real, sigma):
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    assert NearestJudge(real, ATTRIBUTES).predict(real + sigma * noise) == ATTRIBUTES
    result = shares(real, real + sigma * noise, ATTRIBUTES)
    assert result.exact == 1.0
    assert result.by_attribute == dict.fromkeys(VALUES, 1.0)


def test_pictures_of_other_captions_score_what_the_captions_share(real):
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = [ATTRIBUTES[i] for i in order]
    result = shares(real, real[order], ATTRIBUTES)
    for name, values in VALUES.items():
        shared = sum(a[name] == b[name] for a, b in zip(shuffled, ATTRIBUTES, strict=True)) / len(order)
        assert result.by_attribute[name] == pytest.approx(shared)
        assert result.by_attribute[name] == pytest.approx(1 / len(values), abs=0.12)
    assert result.exact <= 0.05


def test_only_the_wanted_attributes_are_judged(real):
    result = shares(real, real[1:2], [{"tone": "1"}])  # picture 1 has tone 2
    assert (result.exact, result.by_attribute) == (0.0, {"tone": 0.0})
    assert NearestJudge(real, ATTRIBUTES).predict(real[1:2])[0]["occupation"] == "a"


def test_detail_finer_than_two_pixels_does_not_count(real):
    checkerboard = torch.ones(32, 32)
    checkerboard[::2, ::2] = checkerboard[1::2, 1::2] = -1
    quiet = real * 0.3
    assert shares(quiet, quiet + 0.5 * checkerboard, ATTRIBUTES).exact == 1.0
    # At full resolution the first of these would be nearer.
    alike, plain = 0.5 * checkerboard + 0.1, torch.zeros(32, 32)
    judge = NearestJudge(torch.stack([alike, plain])[:, None].repeat(1, 3, 1, 1), ATTRIBUTES[:2])
    assert judge.predict(0.5 * checkerboard.repeat(1, 3, 1, 1)) == [ATTRIBUTES[1]]


def test_sizes_and_numbers_must_fit(real):
    judge = NearestJudge(real, ATTRIBUTES)
    with pytest.raises(ValueError, match="16, 16"):
        judge.predict(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="90 images but 1"):
        NearestJudge(real, ATTRIBUTES[:1])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        shares(real, real[:2], ATTRIBUTES[:1])
