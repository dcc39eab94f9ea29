"""Codes known by their vectors: the sums and products written out, and what codes that look alike have in common."""

import pytest
import torch
import torch.nn.functional as F

from t2i.codes.embedding import CodeEmbedding, CodeHead, FromVectors, code_embedding, code_head, take_vectors
from t2i.nn.once import weights_unchanged

pytestmark = pytest.mark.usefixtures("float64")

CODES, DIM, WIDTH = 7, 3, 5


def vectors() -> torch.Tensor:
    return 4 + 2 * torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(0))


def made(kind: type[CodeEmbedding] | type[CodeHead]) -> CodeEmbedding | CodeHead:
    """With weights of its own everywhere, and the codebook's vectors."""
    torch.manual_seed(0)
    module = kind(CODES + 1, CODES, DIM, WIDTH) if kind is CodeEmbedding else kind(CODES, DIM, WIDTH, True)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    take_vectors(module, vectors())
    return module


def given(of: FromVectors, code: int) -> torch.Tensor:
    """A vector in the codebook -> the network's, number by number."""
    every = vectors()
    x = (every[code] - every.mean(0)) / every.var(0, correction=0).sqrt()
    hidden = [F.gelu(sum(of.hidden[i, j] * x[j] for j in range(DIM)) + of.bias[i]) for i in range(WIDTH)]
    return torch.stack([sum(of.out[i, j] * hidden[j] for j in range(WIDTH)) for i in range(WIDTH)])


def test_an_embedding_is_its_row_and_what_its_vector_gives():
    embedding = made(CodeEmbedding)
    found = embedding(torch.tensor([[2, CODES], [0, 2]]))
    for place, code in (((0, 0), 2), ((1, 0), 0), ((1, 1), 2)):
        torch.testing.assert_close(found[place], embedding.weight[code] + given(embedding.of_vectors, code))
    assert torch.equal(found[0, 1], embedding.weight[CODES])  # the mask is no code


def test_a_logit_is_the_product_with_the_code_s_row_and_with_what_its_vector_gives():
    head, x = made(CodeHead), torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = torch.stack([head.weight[code] + given(head.of_vectors, code) for code in range(CODES)])
    torch.testing.assert_close(head(x), x @ rows.T + head.bias)


@pytest.mark.parametrize("with_vectors", [True, False])
def test_what_is_learned_of_a_code_is_learned_of_one_that_looks_like_it(with_vectors):
    every = vectors()
    every[1] = every[0]
    torch.manual_seed(0)
    embedding = code_embedding(CODES, CODES, DIM if with_vectors else None, WIDTH)
    head = code_head(CODES, DIM if with_vectors else None, WIDTH, bias=False)
    for module in (embedding, head):
        take_vectors(module, every)
    x = torch.randn(1, WIDTH)
    before = embedding(torch.tensor(1)).detach(), head(x)[0, 1].item()
    F.cross_entropy(head(x + embedding(torch.tensor([0]))), torch.tensor([0])).backward()
    for parameter in (*embedding.parameters(), *head.parameters()):
        parameter.data -= 0.1 * parameter.grad
    moved = not torch.equal(embedding(torch.tensor(1)), before[0])
    assert (moved, head(x)[0, 1].item() > before[1]) == (with_vectors, with_vectors)


@torch.no_grad()
@pytest.mark.parametrize("kind", [CodeEmbedding, CodeHead])
def test_in_a_walk_the_vectors_are_read_once(kind):
    module, reads = made(kind), []
    module.of_vectors.register_forward_hook(lambda *_: reads.append(1))
    x = torch.tensor([3, 5]) if kind is CodeEmbedding else torch.randn(2, WIDTH)
    before = module(x)
    with weights_unchanged():
        assert torch.equal(module(x), before)
        assert torch.equal(module(x), before)
    assert len(reads) == 2


def test_numbers_without_variance_stay_finite():
    module = FromVectors(CODES, DIM, WIDTH, std=1.0)
    module.take(torch.ones(CODES, DIM))
    assert torch.equal(module.vectors, torch.zeros(CODES, DIM))
