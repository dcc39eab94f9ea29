"""The moving average against its closed form and against timm's."""

from __future__ import annotations

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from t2i.config import EMAConfig
from t2i.training.ema import EMA

BATCH = 8
HALF_LIFE = 40


def steps_of(module: nn.Module, number: int) -> list[dict[str, torch.Tensor]]:
    """The weights after each of `number` random steps, which `module` takes as they are asked for."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        yield {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("rampup_ratio", [None, 0.05, 2.0])
def test_equals_the_closed_form(rampup_ratio):
    """theta_ema = prod(beta) theta_0 + sum_i (1 - beta_i) prod_{j>i} beta_j theta_i (2206.00364, code)."""
    module = linear()
    ema = EMA(dict(module.named_parameters()), EMAConfig(HALF_LIFE, rampup_ratio))
    weights = [{name: p.detach().clone() for name, p in module.named_parameters()}]
    betas = []
    for i, current in enumerate(steps_of(module, 12), start=1):
        seen = i * BATCH
        half_life = HALF_LIFE if rampup_ratio is None else min(HALF_LIFE, rampup_ratio * seen)
        betas.append(2 ** (-BATCH / half_life))
        weights.append(current)
        ema.update(BATCH, seen)
    shares = [1.0] + [1 - beta for beta in betas]
    for i, beta in enumerate(betas, start=1):
        shares[:i] = [share * beta for share in shares[:i]]
    assert sum(shares) == pytest.approx(1)
    for name, average in ema.state_dict().items():
        expected = sum(share * w[name].double() for share, w in zip(shares, weights, strict=True))
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)


def test_equals_timm_where_the_half_life_is_fixed():
    module = linear()
    ema = EMA(dict(module.named_parameters()), EMAConfig(HALF_LIFE, rampup_ratio=None))
    timms = ModelEmaV3(module, decay=2 ** (-BATCH / HALF_LIFE))
    for i, _ in enumerate(steps_of(module, 20), start=1):
        ema.update(BATCH, i * BATCH)
        timms.update(module)
    for name, expected in timms.module.named_parameters():
        torch.testing.assert_close(ema.state_dict()[name], expected.detach())


def test_a_step_counts_half_after_the_half_life_whatever_the_batch():
    for batch in (1, 8, 40):
        module = nn.Linear(1, 1, bias=False)
        nn.init.ones_(module.weight)
        ema = EMA(dict(module.named_parameters()), EMAConfig(HALF_LIFE, rampup_ratio=None))
        nn.init.zeros_(module.weight)
        for seen in range(batch, HALF_LIFE + 1, batch):
            ema.update(batch, seen)
        assert ema.state_dict()["weight"].item() == pytest.approx(0.5, rel=1e-5)


def test_the_average_is_applied_within_the_context_only():
    module = linear()
    ema = EMA(dict(module.named_parameters()), EMAConfig(HALF_LIFE, rampup_ratio=0.05))
    *_, last = steps_of(module, 3)

    def interrupted() -> None:
        with ema.applied():
            assert torch.equal(module.weight, ema.state_dict()["weight"])
            assert not torch.equal(module.weight, last["weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(module.weight, last["weight"])


def test_half_precision_weights_are_averaged_in_full():
    """In bfloat16 steps of 1e-4 on weights of 1 would all be lost."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = EMA({"weight": weight}, EMAConfig(half_life_images=80_000, rampup_ratio=None))
    with torch.no_grad():
        weight.zero_()
    for i in range(1, 101):
        ema.update(BATCH, i * BATCH)
    assert ema.state_dict()["weight"].item() == pytest.approx(2 ** (-100 * BATCH / 80_000), rel=1e-4)


def test_other_names_are_refused():
    ema = EMA(dict(linear().named_parameters()), EMAConfig(HALF_LIFE, rampup_ratio=0.05))
    with pytest.raises(KeyError, match="bias"):
        ema.load_state_dict({"weight": torch.zeros(2, 3)})
