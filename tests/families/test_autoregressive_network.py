"""The transformer over codes: what it sees, what it starts from, and drawing with what it keeps."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from t2i.codes.config import CodeSampling
from t2i.codes.sampling import drawn
from t2i.families.autoregressive.config import NetworkConfig
from t2i.families.autoregressive.drawing import draw_codes, window_starts
from t2i.families.autoregressive.network import CodeTransformer
from t2i.interfaces import TextFeatures
from t2i.nn.guidance import both_texts
from t2i.nn.transformer import Cache

CODES, GRID, TEXT = 11, (4, 4), 5
KINDS = [  # positions, conditioning and attention
    ("learned", "prefix", "full"),
    ("rotary", "prefix", "full"),
    ("rotary", "cross", "full"),
    ("learned", "cross", "axial"),
]
PUBLISHED = (
    "imagegpt/small",
    "imagegpt/medium",
    "imagegpt/large",
    "vqgan/imagenet",
    "parti/350m",
    "dalle/12b",
)


def network(
    positions: str = "learned", conditioning: str = "prefix", attention: str = "full"
) -> CodeTransformer:
    """With weights of its own everywhere, also where training starts at zero."""
    torch.manual_seed(0)
    config = NetworkConfig(
        width=16,
        depth=2,
        heads=2,
        positions=positions,
        norm="layer",
        bias=True,
        qk_norm=True,
        dropout=0.0,
        conditioning=conditioning,
        attention=attention,
    )  # type: ignore[arg-type]
    transformer = CodeTransformer(config, CODES, GRID, text_dim=6, max_tokens=TEXT)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer


@pytest.fixture
def of_recipe(request, compose_run) -> CodeTransformer:
    """With the norms, activations, masks and text of a published recipe, as deep as it is up to a dozen blocks."""
    config = compose_run(f"experiment={request.param}").model.transformer
    small = {"width": 2 * config.heads, "depth": min(config.depth, 12), "vocabulary": CODES}
    torch.manual_seed(0)
    transformer = CodeTransformer(
        dataclasses.replace(config, **small), CODES, GRID, text_dim=6, max_tokens=TEXT
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer.eval()


def words(batch: int, seed: int = 0) -> TextFeatures:
    """Numbers of words where there are others' states."""
    given = text(batch, seed)
    return dataclasses.replace(given, tokens=torch.randint(CODES, (batch, TEXT, 1)).double())


def text(batch: int, seed: int = 0) -> TextFeatures:
    torch.manual_seed(seed)
    lengths = torch.randint(1, TEXT + 1, (batch, 1))
    return TextFeatures(torch.randn(batch, TEXT, 6), torch.randn(batch, 6), torch.arange(TEXT) < lengths)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def codes(batch: int, count: int = math.prod(GRID)) -> torch.Tensor:
    return torch.randint(CODES, (batch, count))


@pytest.mark.parametrize("kind", KINDS)
def test_no_output_depends_on_a_later_code(kind, float64):
    """The gradient of output i by the vector of code j is zero from j = i on, and not before (of DALL-E's masks the
    square of the last block reaches all of so small a grid)."""
    transformer, given = network(*kind), text(1)
    number = math.prod(GRID) - 1
    embedded = transformer.embedding(codes(1, number)).detach().requires_grad_()
    transformer.embedding.forward = lambda codes: embedded  # type: ignore[method-assign, assignment]
    logits = transformer(codes(1, number), given.tokens, given.mask)
    for i in range(number + 1):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), embedded, retain_graph=True)
        of_code = gradient[0].abs().amax(1)
        assert (of_code[i:] == 0).all()
        assert (of_code[:i] > 0).all()


def test_the_start_is_the_loss_of_uniform_codes(float64):
    config = NetworkConfig(
        width=16, depth=1, heads=2, positions="learned", norm="layer", bias=True, qk_norm=False, dropout=0.0
    )
    transformer, given, target = CodeTransformer(config, CODES, GRID, 6, TEXT), text(2), codes(2)
    logits = transformer(target[:, :-1], given.tokens, given.mask)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert loss.item() == pytest.approx(math.log(CODES), abs=1e-14)


def check_kept(transformer: CodeTransformer, given: TextFeatures) -> None:
    """Logits of one code after the other, with what the caches keep, are those of a whole pass."""
    target = codes(len(given))
    with torch.no_grad():
        whole = transformer(target[:, :-1], given.tokens, given.mask)
        caches = [Cache(TEXT + math.prod(GRID)) for _ in transformer.blocks]
        parts = [transformer(target[:, :0], given.tokens, given.mask, torch.tensor([0]), caches)]
        for i in range(math.prod(GRID) - 1):
            parts.append(transformer.following(target[:, i], torch.arange(i + 2), caches))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_with_what_is_kept_the_logits_are_the_same(kind, float64):
    check_kept(network(*kind), text(2))


@pytest.mark.parametrize("of_recipe", PUBLISHED, indirect=True)
def test_with_what_is_kept_published_models_say_and_draw_the_same(float64, of_recipe):
    """Whole, and in a sliding window."""
    with_text = words if of_recipe.config.conditioning == "words" else text
    given, negative = with_text(2), with_text(2, seed=1)
    check_kept(of_recipe, given)
    with torch.no_grad():
        for grid in (GRID, (5, 4)):
            found, _ = draw_codes(
                of_recipe, given, negative, grid, generators(3, 4), sampling(guidance_scale=2.5)
            )
            assert torch.equal(found, by_hand(of_recipe, given, negative, grid, [3, 4], 2.5))


def sampling(**changes) -> CodeSampling:
    return dataclasses.replace(
        CodeSampling(temperature=1.0, top_k=None, top_p=1.0, guidance_scale=1.0), **changes
    )


def by_hand(transformer, given, negative, grid, seeds, guidance) -> torch.Tensor:
    """taming-transformers' sampling beyond the training size, code by code, each by a whole pass over its window; with
    guidance by one for each of the two texts (2203.13131, section 3.3)."""

    def start(i: int, size: int, window: int) -> int:
        if size <= window:
            return 0
        half = window // 2
        if i <= half:
            return 0
        return size - window if size - i < half else i - half

    rows, columns = GRID
    codes = torch.zeros(len(seeds), *grid, dtype=torch.int64)
    uniform = [torch.rand(math.prod(grid), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, left = start(row, grid[0], rows), start(column, grid[1], columns)
            window = [
                (r, c)
                for r in range(top, min(top + rows, grid[0]))
                for c in range(left, min(left + columns, grid[1]))
                if (r, c) <= (row, column)
            ]
            places = torch.tensor([(r - top) * columns + c - left for r, c in window])
            before = torch.stack([codes[:, r, c] for r, c in window[:-1]] or [codes[:, :0, 0]], 1)
            before = before.reshape(len(seeds), -1)
            logits, without = (
                transformer(before, t.tokens, t.mask, places)[:, -1] for t in (given, negative)
            )
            logits = without + guidance * (logits - without)
            numbers = torch.stack([each[row * grid[1] + column] for each in uniform])
            codes[:, row, column] = drawn(logits, numbers, sampling())
    return codes


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("grid", [GRID, (2, 4), (3, 3), (5, 6), (3, 7), (6, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_code_is_drawn_in_its_window(kind, grid, guidance, float64):
    """Where the window covers all that is full attention, and what was kept is used."""
    transformer, given, other = network(*kind), text(2), text(2, seed=1)
    negative = None if guidance == 1 else other
    with torch.no_grad():
        options = sampling(guidance_scale=guidance)
        found, _ = draw_codes(transformer, given, negative, grid, generators(3, 4), options)
        assert torch.equal(found, by_hand(transformer, given, other, grid, [3, 4], guidance))


def test_windows_are_in_the_middle_but_at_the_ends():
    """taming-transformers' rule for a window of 16."""
    assert window_starts(4, 4) == [0, 0, 0, 0]
    assert window_starts(2, 4) == [0, 0]
    assert window_starts(7, 4) == [0, 0, 0, 1, 2, 3, 3]


def test_a_picture_depends_on_its_own_seed_alone(float64):
    transformer, one = network(), text(1)
    two = both_texts(one, one)
    with torch.no_grad():
        together, _ = draw_codes(transformer, two, None, GRID, generators(7, 8), sampling())
        alone, _ = draw_codes(transformer, one, None, GRID, generators(8), sampling())
    assert torch.equal(together[1:], alone)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("grid", [GRID, (GRID[0] + 1, GRID[1])], ids=["cache", "window"])
def test_a_text_that_is_attended_to_is_read_once(grid, float64):
    """Its keys and values in each block, for all codes, with a cache and in a sliding window."""
    transformer, reads = network("rotary", conditioning="cross"), []
    for block in transformer.blocks:
        block.cross_attention.to_k.register_forward_hook(lambda *_: reads.append(1))
    with torch.no_grad():
        draw_codes(transformer, text(1), text(1), grid, [torch.Generator()], sampling(guidance_scale=3.0))
    assert len(reads) == len(transformer.blocks)
