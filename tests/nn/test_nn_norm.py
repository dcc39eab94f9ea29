from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from t2i.nn.norm import LayerNorm, RMSNorm, group_norm

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("channels", "groups"), [(320, 32), (32, 32), (48, 16), (24, 8), (7, 1)])
def test_group_norm_takes_at_most_32_groups(channels: int, groups: int) -> None:
    torch.manual_seed(0)
    y = group_norm(channels)(torch.randn(2, channels, 5, 5) * 3 + 1).reshape(2, groups, -1)
    torch.testing.assert_close(y.mean(dim=2), torch.zeros(2, groups), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(dim=2, correction=0), torch.ones(2, groups), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_follows_its_equation_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 16).to(dtype)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    assert norm(x).dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(norm(x).double(), expected, rtol=rtol, atol=1e-5)


def test_rms_norm_keeps_the_fused_kernel_where_only_x_is_bfloat16() -> None:
    warned_always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of operands it cannot fuse
            RMSNorm(16)(torch.randn(3, 16, dtype=torch.bfloat16))
    finally:
        torch.set_warn_always(warned_always)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm", [group_norm(32), LayerNorm(8), RMSNorm(8)], ids=["group", "layer", "rms"])
def test_a_gpus_autocast_leaves_the_dtype_of_norms(norm: nn.Module, dtype: torch.dtype) -> None:
    """No GPU is needed to see what autocast would do."""
    pretended = {n: p.to(torch.float32) for n, p in norm.named_parameters()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is none
        weights = {n: mode.from_tensor(p.detach()).to("cuda") for n, p in pretended.items()}
        x = torch.empty(2, 32, 8, 8, dtype=dtype, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            torch.set_autocast_enabled("cuda", True)
            plain = torch.nn.functional.layer_norm(x, (8,))
            normed = torch.func.functional_call(norm, weights, (x,))
    assert plain.dtype == torch.float32
    assert normed.dtype == dtype


@pytest.mark.parametrize("norm", [group_norm(32), LayerNorm(8)], ids=["group", "layer"])
def test_norms_are_torchs_but_for_the_dtype(norm: nn.Module) -> None:
    torch.manual_seed(0)
    norm = norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 32, 8, 8)
    plain = type(norm).__mro__[1].forward(norm, x)
    assert torch.equal(norm(x), plain)
    halved = norm.float()(x.bfloat16())
    assert halved.dtype == torch.bfloat16
    torch.testing.assert_close(halved.double(), plain, rtol=0.05, atol=0.05)
