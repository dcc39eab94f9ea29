"""What is computed once for all steps of a walk, and what is not."""

import pytest
import torch
from torch import nn

from t2i.nn.attention import Attention
from t2i.nn.once import once, weights_unchanged

pytestmark = pytest.mark.usefixtures("float64")


@torch.no_grad()
def test_text_is_read_once_and_gives_the_same_bits():
    torch.manual_seed(0)
    attention = Attention(24, 20, heads=3, head_dim=10, qk_norm=True)
    reads = []
    attention.to_k.register_forward_hook(lambda *_: reads.append(1))
    texts = [torch.randn(2, 5, 20) for _ in range(2)]
    steps = [(torch.randn(2, 7, 24), texts[i]) for i in (0, 0, 1, 0)]
    plain = [attention(*step) for step in steps]
    assert len(reads) == 4
    with weights_unchanged():
        kept = [attention(*step) for step in steps]
    assert len(reads) == 4 + 3  # another text, and the first one again, are read anew
    assert all(torch.equal(*pair) for pair in zip(plain, kept, strict=True))
    torch.nn.init.normal_(attention.to_k.weight)
    assert not torch.equal(attention(*steps[0]), plain[0])  # nothing is kept for after


@torch.no_grad()
def test_self_attention_reads_what_it_is_given():
    torch.manual_seed(0)
    attention, x = Attention(24, heads=3, head_dim=8), torch.randn(2, 7, 24)
    with weights_unchanged():
        first = attention(x)
        x += 1
        assert not torch.equal(attention(x), first)


def test_a_walk_is_one_module_s_and_ends_with_an_error():
    """An equal tensor is another one; what a walk within a walk kept is gone after it."""
    layer, other, calls = nn.Linear(2, 2), nn.Linear(2, 2), []
    for each in (layer, other):
        each.register_forward_hook(lambda *_: calls.append(1))
    x = torch.ones(1, 2)

    @weights_unchanged()
    def walk(fails):
        for _ in range(2):
            once(layer, x), once(other, x)
        if fails:
            raise RuntimeError("on the way")

    with torch.no_grad(), weights_unchanged():
        once(layer, x)
        walk(fails=False)
        assert len(calls) == 3
        once(layer, x)
        assert len(calls) == 3
        once(layer, x.clone())
        assert len(calls) == 4
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="on the way"):
            walk(fails=True)
        once(layer, x), once(layer, x)
    assert len(calls) == 4 + 2 + 2


def test_with_gradients_each_step_has_its_own():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with weights_unchanged():
        for _ in range(2):
            once(layer, x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((2,), 2.0))
