"""Drawing codes from logits, beside transformers' own and closed forms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from t2i.codes.config import CodeSampling
from t2i.codes.masked import exponential
from t2i.codes.sampling import drawn, filtered, raced
from t2i.errors import ConfigError
from t2i.nn.guidance import guided

PLAIN = CodeSampling(temperature=1.0, top_k=None, top_p=1.0, guidance_scale=1.0)


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [1, 5, 40, None])
def test_what_is_left_is_what_transformers_leaves(top_k, top_p, float64):
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 40)
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(filtered(logits / 0.7, top_k, top_p), expected)


def test_codes_come_as_often_as_the_softmax_says(float64):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    number = 4000
    even = (torch.arange(number) + 0.5) / number  # in place of random numbers: no chance is left
    codes = drawn(logits.expand(number, 4), even, PLAIN)
    share = torch.bincount(codes, minlength=4) / number
    torch.testing.assert_close(share, logits.softmax(0), atol=1 / number, rtol=0)
    hot = drawn(logits.expand(number, 4), even, dataclasses.replace(PLAIN, temperature=2.0))
    share = torch.bincount(hot, minlength=4) / number
    torch.testing.assert_close(share, (logits / 2).softmax(0), atol=1 / number, rtol=0)


@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (3, 0.7)])
def test_a_number_for_each_code_draws_as_torch_does(top_k, temperature, float64):
    torch.manual_seed(0)
    logits, options = 2 * torch.randn(60, 9), dataclasses.replace(PLAIN, top_k=top_k, temperature=temperature)
    (numbers,) = exponential([torch.Generator().manual_seed(4)], logits.shape)
    left = filtered(logits / temperature, top_k, 1.0).softmax(-1).float()
    expected = torch.multinomial(left, 1, generator=torch.Generator().manual_seed(4))[:, 0]
    assert torch.equal(raced(logits, numbers, options), expected)
    greedy = dataclasses.replace(options, temperature=0.0)
    assert torch.equal(raced(logits, numbers, greedy), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_number_never_draws_what_was_left_out(dtype):
    torch.manual_seed(0)
    logits = torch.randn(200, 50, dtype=dtype)
    largest = torch.full((200,), 1 - 2.0**-24)
    codes = drawn(logits, largest, dataclasses.replace(PLAIN, top_k=3))
    kept = filtered(logits, 3, 1.0).gather(1, codes[:, None])
    assert kept.isfinite().all()


def test_without_temperature_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    greedy = dataclasses.replace(PLAIN, temperature=0.0)
    assert drawn(logits, torch.tensor([0.99]), greedy).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-20, 1e-40, 1e-320])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_hardly_any_temperature_draws_the_most_likely(dtype, temperature):
    logits = torch.tensor([[-3.0, -2.0, 90.0, 1.0], [5.0, 4.0, 3.0, -torch.inf]], dtype=dtype)
    cold = dataclasses.replace(PLAIN, temperature=temperature)
    assert drawn(logits, torch.tensor([0.3, 0.9]), cold).tolist() == [2, 0]
    assert raced(logits, torch.ones(2, 4), cold).tolist() == [2, 0]


def test_guidance_of_one_is_the_conditional(float64):
    one, other = torch.randn(2, 3, 5)
    torch.testing.assert_close(guided(one, other, 1.0), one, atol=1e-15, rtol=0)
    assert torch.equal(guided(one, other, 0.0), other)
    torch.testing.assert_close(guided(one, other, 3.0), 3 * one - 2 * other)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"top_k": 0}, "sampling.top_k"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.5}, "sampling.top_p"),
        ({"guidance_scale": float("nan")}, "sampling.guidance_scale"),
    ],
)
def test_options_out_of_range(changes, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(PLAIN, **changes)


def test_more_than_all_codes():
    with pytest.raises(ConfigError, match=r"sampling.top_k is 65; allowed: at most 64, the number of codes"):
        dataclasses.replace(PLAIN, top_k=65).check_codes(64)
