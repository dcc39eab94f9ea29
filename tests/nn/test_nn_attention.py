from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2i.nn.attention import Attention

pytestmark = pytest.mark.usefixtures("float64")


def by_hand(attention: Attention, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as its equation reads, one head at a time."""
    q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
    head_dim = q.shape[-1] // attention.heads
    outputs = []
    for head in range(attention.heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        q_h, k_h, v_h = q[..., part], k[..., part], v[..., part]
        if isinstance(attention.norm_q, torch.nn.RMSNorm):
            q_h = q_h / (q_h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.norm_q.weight
            k_h = k_h / (k_h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.norm_k.weight
        weight = (torch.einsum("bnd,bld->bnl", q_h, k_h) / head_dim**0.5).exp()
        if mask is not None:
            weight = weight * mask[:, None, :]
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
        outputs.append(torch.einsum("bnl,bld->bnd", weight, v_h))
    projection = attention.to_out[0]
    return torch.cat(outputs, dim=-1) @ projection.weight.T + projection.bias


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("context_dim", [None, 20])
def test_equals_the_softmax_written_out(context_dim: int | None, qk_norm: bool, qkv_bias: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(24, context_dim, heads=3, head_dim=10, qkv_bias=qkv_bias, qk_norm=qk_norm)
    if qk_norm:
        torch.nn.init.normal_(attention.norm_q.weight)
        torch.nn.init.normal_(attention.norm_k.weight)
    x = torch.randn(2, 7, 24)
    context = None if context_dim is None else torch.randn(2, 5, context_dim)
    expected = by_hand(attention, x, x if context is None else context)
    torch.testing.assert_close(attention(x, context), expected, rtol=1e-9, atol=1e-9)
    assert (attention.to_q.bias is not None) == qkv_bias


def test_masked_keys_are_as_if_absent() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 12, heads=2, head_dim=8)
    x, context = torch.randn(2, 6, 16), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, False, False, False], [True, False, True, True, False]])
    out = attention(x, context, mask)
    torch.testing.assert_close(out, by_hand(attention, x, context, mask), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out[:1], attention(x[:1], context[:1, :2]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out[1:], attention(x[1:], context[1:, [0, 2, 3]]), rtol=1e-9, atol=1e-9)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """A backend whose softmax over no keys is NaN; the CPU's own is not."""
    logits = q @ k.mT / q.shape[-1] ** 0.5
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    return logits.softmax(dim=-1) @ v


@pytest.mark.parametrize("naive", [False, True])
def test_a_row_without_keys_attends_to_nothing(naive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if naive:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", naive_attention)
    torch.manual_seed(0)
    attention = Attention(16, 12, heads=2, head_dim=8)
    x, context = torch.randn(2, 6, 16, requires_grad=True), torch.randn(2, 5, 12, requires_grad=True)
    mask = torch.tensor([[False] * 5, [True] * 5])
    out = attention(x, context, mask)
    torch.testing.assert_close(out[0], attention.to_out[0].bias.expand(6, -1))
    torch.testing.assert_close(out[1:], attention(x[1:], context[1:]))
    out.square().sum().backward()
    for grad in (x.grad, context.grad, *(p.grad for p in attention.parameters())):
        assert grad is not None
        assert torch.isfinite(grad).all()
    assert context.grad is not None
    assert not context.grad[0].any()


def test_qk_norm_makes_the_result_blind_to_the_scale_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    attention = Attention(16, heads=2, head_dim=8, qk_norm=True)
    x = torch.randn(1, 6, 16)
    before = attention(x)
    with torch.no_grad():
        attention.to_q.weight *= 100
        attention.to_k.weight *= 100
    torch.testing.assert_close(attention(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bfloat16_is_close_as_autocast_and_as_weights(qk_norm: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 12, heads=2, head_dim=8, qk_norm=qk_norm).float()
    x, context = torch.randn(2, 6, 16).float(), torch.randn(2, 5, 12).float()
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    expected = attention(x, context, mask)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention(x, context, mask).float(), expected, rtol=0, atol=0.02)
    half = attention.bfloat16()(x.bfloat16(), context.bfloat16(), mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.02)
