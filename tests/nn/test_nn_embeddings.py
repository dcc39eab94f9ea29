from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import (
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
    get_timestep_embedding,
)

from t2i.nn.embeddings import sincos_2d, timestep_embedding

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("t", [torch.tensor([0, 1, 500, 999]), torch.tensor([0.0, 0.25, 731.4, 999.9])])
@pytest.mark.parametrize("max_period", [10_000, 100])
def test_timestep_embedding_is_stable_diffusions(t: torch.Tensor, max_period: int) -> None:
    expected = get_timestep_embedding(
        t, 64, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=max_period
    )
    actual = timestep_embedding(t, 64, max_period)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_timestep_embedding_starts_with_the_cosine_of_t_and_tells_neighbours_apart() -> None:
    t = torch.arange(1000)
    embedding = timestep_embedding(t, 32)
    torch.testing.assert_close(embedding[:, 0], t.float().cos())
    torch.testing.assert_close(embedding[:, 16], t.float().sin())
    assert (embedding[1:] - embedding[:-1]).norm(dim=1).min() > 0.1


def test_timestep_embedding_refuses_an_odd_dim() -> None:
    with pytest.raises(ValueError, match="even"):
        timestep_embedding(torch.zeros(1), 31)


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5])
def test_sincos_2d_is_dits_on_a_square(scale: float) -> None:
    expected = get_2d_sincos_pos_embed(48, 6, base_size=6, interpolation_scale=scale, output_type="pt")
    actual = sincos_2d(6, 6, 48, scale)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-6)


def test_sincos_2d_is_dits_on_a_rectangle() -> None:
    columns, rows = torch.meshgrid(torch.arange(7.0), torch.arange(3.0), indexing="xy")
    expected = get_2d_sincos_pos_embed_from_grid(32, torch.stack([columns, rows]), output_type="pt")
    torch.testing.assert_close(sincos_2d(3, 7, 32), expected.float(), rtol=1e-5, atol=1e-6)


def test_sincos_2d_at_scale_two_holds_the_smaller_grid() -> None:
    large = sincos_2d(8, 12, 16, scale=2.0).view(8, 12, 16)
    torch.testing.assert_close(large[::2, ::2].reshape(-1, 16), sincos_2d(4, 6, 16))


def test_sincos_2d_refuses_a_dim_that_two_axes_cannot_share() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(2, 2, 30)
