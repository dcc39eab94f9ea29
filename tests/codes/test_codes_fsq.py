"""FSQ against closed forms: the paper's levels, its index, its gradient."""

import itertools

import pytest
import torch

from t2i.codes.fsq import FSQ

pytestmark = pytest.mark.usefixtures("float64")

LEVELS = (8, 5, 3, 6)


def latents(batch: int = 4) -> torch.Tensor:
    return 2 * torch.randn(batch, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def values_of(level: int) -> list[float]:
    """Even L: -1, -1 + 2/L, .. 1 - 2/L. Odd L: -1 .. 1 in steps of 2 / (L - 1)."""
    return [(i - level // 2) / (level // 2) for i in range(level)]


def test_codes_are_the_product_of_the_levels_the_first_channel_fastest():
    fsq = FSQ(LEVELS)
    assert fsq.num_codes == 720
    codes = fsq.lookup(torch.arange(720).view(1, 1, -1))[0, :, 0].T
    expected = [v[::-1] for v in itertools.product(*(values_of(level) for level in reversed(LEVELS)))]
    torch.testing.assert_close(codes, torch.tensor(expected), rtol=1e-12, atol=1e-12)


def test_each_channel_goes_to_the_nearest_of_its_levels():
    """tanh(z) alone, but for an even number of levels a shift that keeps 0 at 0, and half a level down."""
    z = latents()
    result = FSQ(LEVELS)(z)
    for channel, level in enumerate(LEVELS):
        half, offset = 1.001 * (level - 1) / 2, 0.5 if level % 2 == 0 else 0.0
        bounded = half * torch.tanh(z[:, channel] + torch.atanh(torch.tensor(offset / half))) - offset
        distance = (bounded[..., None] / (level // 2) - torch.tensor(values_of(level))).abs()
        expected = torch.tensor(values_of(level))[distance.argmin(-1)]
        torch.testing.assert_close(result.latent[:, channel], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [3, 4, 5, 8, 15])
def test_every_level_is_reached_and_zero_stays(level):
    fsq = FSQ([level])
    result = fsq(torch.linspace(-9, 9, 4001).view(1, 1, 1, -1))
    assert torch.equal(result.indices.unique(), torch.arange(level))
    assert (result.indices.diff() >= 0).all()
    assert fsq(torch.zeros(1, 1, 1, 1)).latent.item() == 0.0
    # So far out that tanh is exactly 1.
    assert fsq(torch.tensor([-1e9, 1e9]).view(1, 1, 1, 2)).indices.flatten().tolist() == [0, level - 1]


def test_known_values():
    """Of vector-quantize-pytorch 1.32, FSQ([8, 5, 5, 5]), in float64."""
    z = torch.tensor([[0.3, -1.2, 0.7, 2.0], [-2.5, 0.1, -0.4, 0.05]]).T.reshape(1, 4, 1, 2)
    result = FSQ([8, 5, 5, 5])(z)
    assert result.indices.flatten().tolist() == [925, 456]
    torch.testing.assert_close(
        result.latent[0, :, 0].T, torch.tensor([[0.25, -1.0, 0.5, 1.0], [-1.0, 0.0, -0.5, 0.0]])
    )


def test_straight_through_gradient_is_that_of_the_bound():
    fsq, z = FSQ([5, 8]), torch.tensor([0.3, -0.7]).view(1, 2, 1, 1).requires_grad_()
    (grad,) = torch.autograd.grad(fsq(z).latent.sum(), z)
    shift = torch.atanh(torch.tensor(0.5 / (1.001 * 3.5)))
    expected = [
        1.001 * 2 / 2 * (1 - torch.tanh(z[0, 0]) ** 2),
        1.001 * 3.5 / 4 * (1 - torch.tanh(z[0, 1] + shift) ** 2),
    ]
    torch.testing.assert_close(grad.flatten(), torch.cat(expected).flatten())


def test_indices_there_and_back():
    fsq = FSQ(LEVELS)
    tokens = torch.arange(fsq.num_codes).view(1, 24, 30)
    z = torch.atanh(fsq.lookup(tokens).clamp(-0.999, 0.999))
    result = fsq(latents())
    assert torch.equal(fsq.indices(latents()), result.indices)
    torch.testing.assert_close(fsq.lookup(result.indices), result.latent, rtol=1e-9, atol=1e-9)
    assert fsq.indices(z).shape == tokens.shape


def test_usage_and_perplexity():
    fsq = FSQ([3])
    result = fsq(torch.tensor([0.0, 0.1, 5.0, -0.1]).view(1, 1, 2, 2))
    torch.testing.assert_close(result.usage, torch.tensor(2 / 3))
    expected = torch.distributions.Categorical(torch.tensor([0.75, 0.25])).entropy().exp()
    torch.testing.assert_close(result.perplexity, expected)


def test_keeps_nothing_and_takes_any_number():
    fsq = FSQ(LEVELS)
    assert not fsq.state_dict()
    assert not list(fsq.parameters())
    z = latents()
    z[0] = float("nan")
    result = fsq(z)
    assert not result.latent.isfinite().all()
    assert 0 <= result.indices.min() <= result.indices.max() < 720


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_the_codes(dtype):
    z = latents()
    with torch.autocast("cpu", dtype=dtype):
        result = FSQ(LEVELS)(z)
    assert torch.equal(result.indices, FSQ(LEVELS)(z).indices)
    assert result.latent.dtype == torch.float64


def test_in_half_precision_the_codes_are_of_the_weights_dtype():
    fsq = FSQ(LEVELS).to(torch.bfloat16)
    assert fsq.lookup(torch.zeros(1, 2, 2, dtype=torch.int64)).dtype == torch.bfloat16
