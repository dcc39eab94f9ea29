"""Gumbel codes against closed forms and torch's own distributions."""

import math

import pytest
import torch

from t2i.codes.gumbel import GumbelCodes

pytestmark = pytest.mark.usefixtures("float64")


def logits(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 7, 4, 5, generator=torch.Generator().manual_seed(0))


def noise(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 7, 4, 5, generator=torch.Generator().manual_seed(1))


def quantizer(**kwargs) -> GumbelCodes:
    torch.manual_seed(0)
    return GumbelCodes(7, 4, kl_weight=kwargs.pop("kl_weight", 0.5), **kwargs)


def test_without_noise_the_likeliest_code():
    codes, z = quantizer(), logits()
    result = codes(z)
    assert torch.equal(result.indices, z.argmax(1))
    torch.testing.assert_close(result.latent[1, :, 2, 3], codes.codes[z[1, :, 2, 3].argmax()])
    assert torch.equal(codes.indices(z), result.indices)
    assert torch.equal(codes.lookup(result.indices), result.latent)


def test_the_sample_is_that_of_torchs_relaxed_one_hot():
    """Its transform of the same uniform numbers; half-way, the temperature is the mean of the two ends."""
    codes, z, u = quantizer(anneal_images=100), logits(), noise()
    relaxed = torch.distributions.RelaxedOneHotCategorical(
        torch.tensor((1 + 1 / 16) / 2), logits=z.movedim(1, -1)
    )
    gumbel = -torch.log(-torch.log(u.movedim(1, -1)))
    score = (relaxed.logits + gumbel) / relaxed.temperature
    share = (score - score.logsumexp(-1, keepdim=True)).exp()
    torch.testing.assert_close(codes(z, u, 50).latent, (share @ codes.codes).movedim(-1, 1))
    torch.testing.assert_close(codes(z, u, 50).metrics["temperature"], torch.tensor(17 / 32))


def test_cold_samples_have_the_frequencies_of_the_softmax():
    codes = quantizer(start_temperature=1e-3, end_temperature=1e-3)
    with torch.no_grad():
        codes.codes.copy_(torch.eye(7)[:, :4])
    z = logits(1)[:, :, :1, :1].expand(1, 7, 100, 200)
    u = torch.rand(1, 7, 100, 200, generator=torch.Generator().manual_seed(2))
    found = codes(z, u).latent.mean((0, 2, 3))
    torch.testing.assert_close(found, z[0, :, 0, 0].softmax(0)[:4], rtol=0, atol=0.015)


def test_the_kl_is_to_uniform_at_each_position():
    z = logits()
    given = torch.distributions.Categorical(logits=z.movedim(1, -1))
    uniform = torch.distributions.Categorical(torch.ones(7))
    expected = torch.distributions.kl_divergence(given, uniform).mean()
    torch.testing.assert_close(quantizer()(z).loss, 0.5 * expected)
    assert quantizer()(torch.zeros_like(z)).loss.abs() < 1e-12
    sure = torch.zeros_like(z)
    sure[:, 2] = 1e3
    torch.testing.assert_close(quantizer()(sure).loss, torch.tensor(0.5 * math.log(7)))


def test_temperature_and_weight_change_with_the_images_seen():
    codes = quantizer(anneal_images=1000, kl_warmup_images=400)
    assert [codes.temperature(n) for n in (0, 1000, 5000)] == [1.0, 1 / 16, 1 / 16]
    assert codes.temperature(250) == pytest.approx(1 / 16 + 15 / 16 * (1 + math.sqrt(0.5)) / 2)
    full = codes(logits(), None, 400).loss
    torch.testing.assert_close(codes(logits(), None, 100).loss, full * (1 - math.sqrt(0.5)) / 2)
    assert codes(logits(), None, 0).loss == 0.0


def test_gradients_reach_logits_and_codes():
    codes, u = quantizer(anneal_images=100), noise(1)[..., :2, :2]
    z = logits(1)[..., :2, :2].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, c: torch.func.functional_call(codes, {"codes": c}, (x, u, 30)).latent, (z, codes.codes)
    )


def test_a_uniform_number_of_zero_is_allowed():
    result = quantizer()(logits(), torch.zeros(3, 7, 4, 5))
    assert result.latent.isfinite().all()
