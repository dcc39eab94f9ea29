"""What lies between two noises and two captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from t2i.errors import ConfigError
from t2i.interfaces import Between, SampleRequest, TextFeatures
from t2i.nn.between import asked_noise, asked_text, slerp

pytestmark = pytest.mark.usefixtures("float64")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_slerp_is_scipys(share: float) -> None:
    a, b = (torch.nn.functional.normalize(normal(3, 7, seed=seed), dim=1) for seed in (0, 1))
    ours = slerp(a, b, torch.full((3,), share))
    theirs = np.stack([geometric_slerp(x.numpy(), y.numpy(), share) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-12, atol=1e-12)


def test_slerp_keeps_the_norm_of_noise_and_is_straight_along_one_direction() -> None:
    a, b = normal(2, 10_000), normal(2, 10_000, seed=1)
    norm = slerp(a, b, torch.tensor([0.5, 0.5])).norm(dim=1)
    torch.testing.assert_close(norm, torch.full((2,), 100.0), rtol=0.02, atol=0)
    torch.testing.assert_close(slerp(a, 3 * a, torch.tensor([0.5, 0.5])), 2 * a)
    zero = torch.zeros_like(a)
    torch.testing.assert_close(slerp(zero, zero, torch.tensor([0.5, 0.5])), zero)


def request(shares: list[float], noise: torch.Tensor | None = None) -> SampleRequest:
    count = len(shares)
    between = Between(shares, ["bb"] * count, None if noise is not None else [7] * count)
    return SampleRequest(["a"] * count, [3] * count, 8, 8, between=between, noise=noise)


def test_noise_lies_between_that_of_the_seeds() -> None:
    generators = [torch.Generator().manual_seed(3) for _ in range(3)]
    found = asked_noise(request([0.0, 1.0, 0.5]), generators, (4, 5))
    torch.testing.assert_close(found[0], normal(4, 5, seed=3))
    torch.testing.assert_close(found[1], normal(4, 5, seed=7))
    both = torch.stack([normal(20, seed=3), normal(20, seed=7)])
    torch.testing.assert_close(found[2].flatten(), slerp(both[:1], both[1:], torch.tensor([0.5]))[0])
    given = normal(3, 4, 5)
    assert asked_noise(request([0.0] * 3, given), generators, (4, 5)) is given
    with pytest.raises(ConfigError, match=r"noise is 'of shape \(4, 5\)'; allowed: \(4, 6\)"):
        asked_noise(request([0.0] * 3, given), generators, (4, 6))


class Counting:
    """A caption's length decides its mask."""

    def __call__(self, captions: list[str]) -> TextFeatures:
        lengths = torch.tensor([len(each) for each in captions])
        tokens = torch.stack([normal(4, 6, seed=len(each)) for each in captions])
        return TextFeatures(tokens, tokens[:, 0], torch.arange(4) < lengths[:, None])


def test_text_lies_between_and_is_its_own_at_the_ends() -> None:
    encoder = Counting()
    found = asked_text(encoder, request([0.0, 0.5, 1.0]))  # type: ignore[arg-type]
    first, second = encoder(["a"]), encoder(["bb"])
    for row, end in ((0, first), (2, second)):
        torch.testing.assert_close(found.tokens[row], end.tokens[0])
        torch.testing.assert_close(found.pooled[row], end.pooled[0])
        assert torch.equal(found.mask[row], end.mask[0])
    assert torch.equal(found.mask[1], second.mask[0])
    assert not torch.allclose(found.tokens[1], first.tokens[0])


def test_rows_have_their_own_share() -> None:
    part = request([0.0, 0.5, 1.0]).rows([2, 0])
    assert part.between == Between([1.0, 0.0], ["bb"] * 2, [7, 7])
    assert part.seeds == [3, 3]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("mask is 'given'; allowed: only with a picture", {"mask": torch.ones(1, 1, 8, 8)}),
        (
            r"mask \(height, width\) is \(4, 8\); allowed: \(8, 8\)",
            {"mask": torch.ones(1, 1, 4, 8), "image": torch.zeros(1, 3, 8, 8)},
        ),
        ("mask is 'empty'", {"mask": torch.zeros(1, 1, 8, 8), "image": torch.zeros(1, 3, 8, 8)}),
        ("mask is 'of other values'", {"mask": torch.rand(1, 1, 8, 8), "image": torch.zeros(1, 3, 8, 8)}),
        ("tile is 'z'; allowed: x, y, xy", {"tile": "z"}),
        ("noise is 'given'", {"noise": torch.zeros(1, 3, 8, 8), "between": Between([0.5], None, [1])}),
    ],
)
def test_what_does_not_fit_together_is_refused(message: str, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleRequest(["a"], [0], 8, 8, **changes)  # type: ignore[arg-type]
