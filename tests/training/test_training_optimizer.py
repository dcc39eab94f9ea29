"""Learning rates in closed form, and what is decayed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from t2i.config import OptimizerConfig
from t2i.errors import ConfigError
from t2i.training.optimizer import build_optimizer, learning_rate


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_is_a_straight_line_to_the_peak(schedule):
    config = OptimizerConfig(learning_rate=2.0, warmup_images=100, schedule=schedule)
    rates = [learning_rate(config, images, 1_000) for images in range(100)]
    assert rates == pytest.approx([2.0 * (images + 1) / 100 for images in range(100)])
    assert learning_rate(config, 100, 1_000) == 2.0


def test_constant_stays():
    config = OptimizerConfig(learning_rate=2.0, schedule="constant", warmup_images=0)
    assert {learning_rate(config, images, 1_000) for images in (0, 1, 999, 1_000, 5_000)} == {2.0}


def test_cosine_falls_to_zero_at_the_end_and_stays():
    config = OptimizerConfig(learning_rate=2.0, warmup_images=100, schedule="cosine")
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        expected = 2.0 * math.cos(math.pi / 2 * share) ** 2
        assert learning_rate(config, 100 + int(share * 900), 1_000) == pytest.approx(expected)
    assert learning_rate(config, 2_000, 1_000) == pytest.approx(0)


def test_step_decay_halves_every_so_many_images():
    config = OptimizerConfig(
        learning_rate=8.0, warmup_images=10, schedule="step", halve_every_images=100, muon_scale=None
    )
    rates = [learning_rate(config, images, 1_000) for images in (4, 10, 99, 100, 250, 1_000)]
    assert rates == [4.0, 8.0, 8.0, 4.0, 2.0, 8.0 / 2**10]


@pytest.mark.parametrize(
    ("schedule", "every", "allowed"),
    [
        ("step", None, "1 or more"),
        ("step", 0, "1 or more"),
        ("cosine", 100, "null"),
        ("constant", 100, "null"),
    ],
)
def test_what_is_halved_says_how_often(schedule, every, allowed):
    said = (
        rf"optimizer\.halve_every_images is {every}; allowed: {allowed} with optimizer\.schedule={schedule}"
    )
    with pytest.raises(ConfigError, match=said):
        OptimizerConfig(1.0, warmup_images=0, schedule=schedule, halve_every_images=every)


def test_a_run_shorter_than_its_warm_up_has_a_rate():
    config = OptimizerConfig(learning_rate=2.0, warmup_images=100, schedule="cosine")
    assert 0 < learning_rate(config, 49, 50) <= 2.0


def test_vectors_are_not_decayed_and_frozen_weights_are_left_out():
    first, norm, frozen = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3).requires_grad_(False)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup_images=0)
    groups = [[*first.parameters(), *frozen.parameters()], list(norm.parameters())]
    optimizer = build_optimizer(groups, [], config)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in [*first.parameters(), *norm.parameters()]}
    before = {p: p.detach().clone() for p in trained}
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, value in before.items():
        torch.testing.assert_close(p.detach(), value * (1 - 0.1 * 0.5) if p.ndim >= 2 else value)


def test_a_gradient_that_lies_otherwise_in_memory_is_read_as_what_it_is():
    """torch's fused AdamW reads it in the order of the parameter's memory."""
    gradient = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
    config = OptimizerConfig(learning_rate=1.0, warmup_images=0, schedule="constant", muon_scale=None)
    ends = []
    for given in (gradient, gradient.T.contiguous().T):
        parameter = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
        optimizer = build_optimizer([[parameter]], [], config)
        parameter.grad = given
        optimizer.step()
        ends.append(optimizer.state[parameter]["exp_avg"])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    torch.testing.assert_close(ends[0], (1 - config.betas[0]) * gradient)
