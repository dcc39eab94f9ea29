"""DALL-E's masks beside their definition, code by code."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from t2i.families.autoregressive.config import NetworkConfig
from t2i.families.autoregressive.masks import KERNEL, axial_mask, pattern_of, seen_before
from t2i.families.autoregressive.network import CodeTransformer
from t2i.nn.transformer import Cache


def by_definition(pattern: str, query: int, key: int, columns: int, kernel: int) -> bool:
    """2102.12092, figure 11: the previous columns + 1 codes by rows; the codes of the column; a square whose rows go on
    at their ends. Each with the code itself."""
    if key > query:
        return False
    if pattern == "row":
        return key in range(query - columns, query + 1)
    if pattern == "column":
        return key % columns == query % columns
    half = kernel // 2
    square = itertools.product(range(-half, 1), range(-half, half + 1))
    return any(query + up * columns + across == key for up, across in square)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (7, 2)])
@pytest.mark.parametrize("pattern", ["row", "column", "convolutional"])
def test_each_code_sees_what_the_definition_says(pattern, grid, kernel):
    places = torch.arange(grid[0] * grid[1])
    found = seen_before(pattern, places, places, grid[1], kernel)
    expected = [[by_definition(pattern, int(q), int(k), grid[1], kernel) for k in places] for q in places]
    assert found.tolist() == expected


def test_the_papers_example_of_a_row():
    """Figure 11a: of a 4 x 4 grid "each image token attends to the previous 5 image tokens in raster order"."""
    places = torch.arange(16)
    assert seen_before("row", places, places, 4).sum(1).tolist() == [1, 2, 3, 4, *[5] * 12]


def test_all_slots_see_the_text_before_them():
    text, places = torch.full((3,), -1), torch.arange(6)
    held = torch.cat([text, places])
    mask = axial_mask("column", held, held, 3, 0)
    assert mask[3:, :3].all()
    assert torch.equal(mask[:3, :3], torch.ones(3, 3, dtype=torch.bool).tril())
    assert not mask[:3, 3:].any()
    assert torch.equal(mask[3:, 3:], seen_before("column", places, places, 3))
    assert torch.equal(axial_mask("column", held[5:], held, 3, 5), mask[5:])


def test_the_order_of_the_blocks():
    """Appendix B.1: of blocks counted from 1, column where (i - 2) mod 4 is 0, the last convolutional, others row."""
    order = [pattern_of(i, 8) for i in range(8)]
    assert order == ["row", "column", "row", "row", "row", "column", "row", "convolutional"]
    assert KERNEL == 11


@pytest.mark.parametrize("conditioning", ["prefix", "cross"])
def test_with_what_is_kept_masked_blocks_say_the_same(conditioning, float64):
    torch.manual_seed(0)
    config = NetworkConfig(
        width=16,
        depth=3,
        heads=2,
        positions="learned",
        norm="layer",
        bias=True,
        qk_norm=False,
        dropout=0.0,
        conditioning=conditioning,
        attention="axial",
    )
    network = CodeTransformer(config, 11, (3, 4), text_dim=6, max_tokens=5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    codes, tokens = torch.randint(11, (2, 11)), torch.randn(2, 5, 6)
    mask = torch.arange(5) < torch.tensor([[2], [5]])
    with torch.no_grad():
        whole = network(codes, tokens, mask)
        caches = [Cache(5 + 12) for _ in network.blocks]
        parts = [network(codes[:, :0], tokens, mask, torch.tensor([0]), caches)]
        parts += [network.following(codes[:, i], torch.arange(i + 2), caches) for i in range(11)]
        dense = CodeTransformer.forward(with_full_attention(network), codes, tokens, mask)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
    assert not torch.allclose(whole, dense)


def with_full_attention(network: CodeTransformer) -> CodeTransformer:
    network.config = dataclasses.replace(network.config, attention="full")
    return network
