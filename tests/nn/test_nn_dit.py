"""The diffusion transformer: shapes, gradients, masks and positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from t2i.errors import ConfigError
from t2i.nn.dit import DiT, Refiner, unpatchify
from t2i.nn.dit_config import DiTConfig

pytestmark = pytest.mark.usefixtures("float64")

CONFIG = DiTConfig("dit", patch_size=2, width=32, depth=2, heads=4, refiner_width=8, refiner_depth=1)
CHANNELS, CONTEXT, POOLED, LENGTH = 3, 24, 20, 7


def build(config: DiTConfig = CONFIG) -> DiT:
    """With random weights throughout, so that zero-initialised layers hide nothing."""
    torch.manual_seed(0)
    dit = DiT(config, CHANNELS, CONTEXT, POOLED).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return dit


def inputs(height: int = 8, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, CHANNELS, height, width, generator=generator),
        "t": torch.tensor([17.0, 803.5]),
        "context": torch.randn(2, LENGTH, CONTEXT, generator=generator),
        "pooled": torch.randn(2, POOLED, generator=generator),
        "context_mask": torch.arange(LENGTH) < torch.tensor([[3], [LENGTH]]),
    }


@pytest.mark.parametrize("refiner_patch_size", [1, 2])
@pytest.mark.parametrize("patch_size", [2, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (16, 8)])
def test_the_output_has_the_shape_of_the_latent(patch_size, refiner_patch_size, height, width):
    config = dataclasses.replace(CONFIG, patch_size=patch_size, refiner_patch_size=refiner_patch_size)
    out = build(config)(**inputs(height, width))
    assert out.shape == (2, CHANNELS, height, width)
    assert out.isfinite().all()


def test_starts_with_zero():
    """adaLN-Zero (2212.09748, section 3.2)."""
    torch.manual_seed(0)
    assert DiT(CONFIG, CHANNELS, CONTEXT, POOLED)(**inputs()).eq(0).all()


def test_every_parameter_learns():
    dit = build()
    dit(**inputs()).square().mean().backward()
    silent = [name for name, p in dit.named_parameters() if p.grad is None or p.grad.eq(0).all()]
    assert silent == []


@pytest.mark.parametrize("name", ["t", "context", "pooled", "x"])
def test_everything_it_is_given_counts(name):
    """And only for its own picture."""
    dit, given = build(), inputs()
    before = dit(**given)
    given[name] = given[name].clone()
    given[name][0] += torch.randn(given[name][0].shape)  # not a constant, which layer norms take away
    after = dit(**given)
    assert (after[0] - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[1], before[1])


def test_padding_changes_nothing():
    """Neither what stands in it nor how much of it there is."""
    dit, given = build(), inputs()
    before = dit(**given)
    given["context"][0, 3:] = 100 * torch.randn(LENGTH - 3, CONTEXT)
    torch.testing.assert_close(dit(**given), before)
    more = 5
    given["context"] = torch.cat([given["context"], torch.randn(2, more, CONTEXT)], dim=1)
    given["context_mask"] = torch.cat([given["context_mask"], torch.zeros(2, more, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(dit(**given), before)
    without_mask = dit(**(given | {"context_mask": None}))
    assert (without_mask - before).abs().max() > 1e-3


def test_the_order_of_text_tokens_is_the_encoders_business():
    dit, given = build(), inputs()
    before = dit(**given)
    order = torch.tensor([4, 2, 6, 0, 5, 3, 1])
    given["context"], given["context_mask"] = given["context"][:, order], given["context_mask"][:, order]
    torch.testing.assert_close(dit(**given), before)


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """The patches of x (B, C, h, w) in another order."""
    rows = x.shape[2] // CONFIG.patch_size
    patches = rearrange(x, "b c (h p) (w q) -> b (h w) c p q", p=CONFIG.patch_size, q=CONFIG.patch_size)[
        :, order
    ]
    return rearrange(patches, "b (h w) c p q -> b c (h p) (w q)", h=rows)


def test_positions_are_all_that_orders_the_patches(monkeypatch):
    """Without them the transformer commutes with any order of the patches; with them it does not."""
    dit, given = build(dataclasses.replace(CONFIG, refiner_depth=0)), inputs()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    moved = given | {"x": permuted(given["x"], order)}
    assert (dit(**moved) - permuted(dit(**given), order)).abs().max() > 1e-2
    nowhere = lambda rows, columns, dim, *_: torch.zeros(rows * columns, dim)  # noqa: E731
    monkeypatch.setattr("t2i.nn.dit.sincos_2d", nowhere)
    torch.testing.assert_close(dit(**moved), permuted(dit(**given), order))


def test_the_refiner_sees_across_the_edges_of_patches():
    """One latent value changes its neighbours' part of the refiner in the next patch, not only its own."""
    dit, given = build(), inputs()
    assert dit.refiner is not None
    tokens, condition = torch.randn(2, 16, CONFIG.width), torch.randn(2, CONFIG.width)
    moved = given["x"].clone()
    moved[:, :, 3, 3] += 1
    change = dit.refiner(moved, tokens, condition) - dit.refiner(given["x"], tokens, condition)
    assert change[:, :, 4, 4].abs().min() > 1e-4


def test_the_refiner_of_squares_is_that_of_their_channels():
    """Squares of 2 x 2 positions are refined as a map of half the side with four times the channels is."""
    squares = build(dataclasses.replace(CONFIG, patch_size=4, refiner_patch_size=2)).refiner
    channels = Refiner(CONFIG, 4 * CHANNELS)
    channels.load_state_dict(squares.state_dict())
    x, tokens, condition = (
        torch.randn(2, CHANNELS, 16, 16),
        torch.randn(2, 16, CONFIG.width),
        torch.randn(2, 32),
    )
    expected = channels(nn.functional.pixel_unshuffle(x, 2), tokens, condition)
    torch.testing.assert_close(squares(x, tokens, condition), nn.functional.pixel_shuffle(expected, 2))


def test_larger_patches_continue_smaller_ones():
    """Of a latent upsampled twice, patches twice as large draw what the smaller ones drew, upsampled."""
    small, given = build(dataclasses.replace(CONFIG, refiner_depth=0)), inputs()
    large = build(dataclasses.replace(CONFIG, refiner_depth=0, patch_size=2 * CONFIG.patch_size))
    large.load_state_dict(large.fitted(small.state_dict()))
    upsampled = nn.functional.interpolate(given["x"], scale_factor=2)
    expected = nn.functional.interpolate(small(**given), scale_factor=2)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(large(**given | {"x": upsampled}), expected)


@pytest.mark.parametrize("refiner_patch_size", [1, 2])
def test_larger_patches_give_the_refiner_the_same_features(refiner_patch_size):
    config = dataclasses.replace(CONFIG, refiner_patch_size=refiner_patch_size)
    small, large = build(config), build(dataclasses.replace(config, patch_size=4))
    tokens = torch.randn(2, 16, CONFIG.width)
    large.load_state_dict(large.fitted(small.state_dict()))
    maps = [unpatchify(dit.refiner.features(tokens), 4, dit.refiner.token_size) for dit in (small, large)]
    torch.testing.assert_close(maps[1], nn.functional.interpolate(maps[0], scale_factor=2))


def test_patches_of_the_same_size_keep_their_weights_and_smaller_ones_do_not_fit():
    dit, small = build(), build(dataclasses.replace(CONFIG, patch_size=1))
    state = dit.state_dict()
    for fitted in (dit.fitted(state), small.fitted(state)):
        assert all(torch.equal(fitted[name], value) for name, value in state.items())


def test_muon_gets_no_embedding_modulation_or_output():
    dit = build()
    chosen = {id(p) for p in dit.hidden_matrices()}
    names = {name for name, p in dit.named_parameters() if id(p) in chosen}
    per_block = {
        f"{part}.to_{x}.weight" for part in ("attention", "cross_attention") for x in ("q", "k", "v")
    }
    per_block |= {
        "attention.to_out.0.weight",
        "cross_attention.to_out.0.weight",
        "mlp.0.weight",
        "mlp.2.weight",
    }
    expected = {f"blocks.{i}.{name}" for i in range(CONFIG.depth) for name in per_block}
    assert names == expected | {"refiner.blocks.0.conv1.weight", "refiner.blocks.0.conv2.weight"}


def positions(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The range of positions that a latent of this size is given: how far rows and columns go."""
    seen = []

    def spy(rows: int, columns: int, dim: int, scale: float, device: torch.device) -> Tensor:
        seen.append((rows / scale, columns / scale))
        return torch.zeros(rows * columns, dim)

    monkeypatch.setattr("t2i.nn.dit.sincos_2d", spy)
    build()(**inputs(height, width))
    return seen[0]


def test_positions_span_the_same_range_at_every_resolution(monkeypatch):
    """So that a higher resolution meets no positions that the lower one has not learned."""
    span = positions(8, 8, monkeypatch)
    assert positions(16, 16, monkeypatch) == positions(32, 32, monkeypatch) == span
    assert positions(8, 16, monkeypatch) == (span[0] / 2, span[1])
    assert positions(16, 8, monkeypatch) == (span[0], span[1] / 2)


def test_config_refuses_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"denoiser\.width is 32; allowed: a multiple of heads \(5\)"):
        dataclasses.replace(CONFIG, heads=5)
    with pytest.raises(ConfigError, match=r"denoiser\.depth is 0; allowed: 1 or more"):
        dataclasses.replace(CONFIG, depth=0)
    with pytest.raises(ConfigError, match=r"denoiser\.refiner_depth is -1; allowed: 0 or more"):
        dataclasses.replace(CONFIG, refiner_depth=-1)
    with pytest.raises(
        ConfigError, match=r"denoiser\.refiner_patch_size is 3; allowed: a divisor of patch_size \(2\)"
    ):
        dataclasses.replace(CONFIG, refiner_patch_size=3)
