"""LFQ against all its codes written out."""

import pytest
import torch

from t2i.codes.lfq import LFQ

pytestmark = pytest.mark.usefixtures("float64")


def latents(bits: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, bits, 6, 6, generator=torch.Generator().manual_seed(0))


def codes_of(bits: int) -> torch.Tensor:
    """(2^bits, bits) of -1 and 1, the first channel the lowest bit."""
    return torch.tensor([[1.0 if i >> bit & 1 else -1.0 for bit in range(bits)] for i in range(2**bits)])


def test_the_code_is_the_nearest_of_all():
    z, codes = latents(5), codes_of(5)
    result = LFQ(32)(z)
    distance = torch.cdist(z.movedim(1, -1).flatten(0, 2), codes)
    assert torch.equal(result.indices.flatten(), distance.argmin(1))
    torch.testing.assert_close(result.latent.movedim(1, -1).flatten(0, 2), codes[distance.argmin(1)])
    assert torch.equal(LFQ(32).lookup(torch.arange(32).view(1, 4, 8)).flatten(2)[0].T, codes)
    assert torch.equal(LFQ(32).indices(z), result.indices)
    assert LFQ(4).indices(torch.zeros(1, 2, 1, 1)).item() == 0  # 0 is no positive number


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_entropies_against_the_softmax_over_all_codes(temperature):
    z, codes = latents(5), codes_of(5)
    share = torch.softmax(-(torch.cdist(z.movedim(1, -1).flatten(0, 2), codes) ** 2) / temperature, dim=1)
    of_each = torch.distributions.Categorical(share).entropy().mean()
    of_all = torch.distributions.Categorical(share.mean(0)).entropy()
    quantizer = LFQ(32, entropy_weight=0.3, entropy_temperature=temperature, commitment_weight=0.2)
    result = quantizer(z)
    torch.testing.assert_close(result.metrics["entropy_of_each"], of_each)
    torch.testing.assert_close(result.metrics["entropy_of_all"], of_all)
    commitment = (z - z.sign()).square().mean()
    torch.testing.assert_close(result.loss, 0.3 * (of_each - of_all) + 0.2 * commitment)


def test_many_bits_are_cut_into_groups():
    z = latents(13)
    quantizer = LFQ(2**13, entropy_temperature=3.0)
    first, second = LFQ(2**10, entropy_temperature=3.0), LFQ(2**3, entropy_temperature=3.0)
    parts = [first.entropies(z[:, :10]), second.entropies(z[:, 10:])]
    for ours, expected in zip(quantizer.entropies(z), map(sum, zip(*parts, strict=True)), strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradients():
    """Straight through to the latent; of the loss as torch finds it by differences."""
    z = latents(3, batch=2)[..., :2, :2].requires_grad_()
    quantizer = LFQ(8, entropy_temperature=2.0)
    cotangent = torch.randn(2, 3, 2, 2)
    (through,) = torch.autograd.grad(quantizer(z).latent, z, cotangent)
    assert torch.equal(through, cotangent)
    assert torch.autograd.gradcheck(lambda x: quantizer(x).loss, (z,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_codes_have_no_share_at_all_gradients_are_finite(dtype):
    """One position, far from zero: the share of all other codes is 0 to the last digit."""
    z = (1e4 * latents(10)[:1, :, :1, :1]).to(dtype).requires_grad_()
    result = LFQ(1024)(z)
    (grad,) = torch.autograd.grad(result.loss, z)
    assert grad.isfinite().all()
    torch.testing.assert_close(result.metrics["entropy_of_each"], torch.tensor(0.0, dtype=dtype))
    torch.testing.assert_close(result.metrics["entropy_of_all"], torch.tensor(0.0, dtype=dtype))


def test_keeps_nothing():
    assert not LFQ(16).state_dict()
    assert LFQ(16).to(torch.bfloat16).lookup(torch.zeros(1, 1, 1, dtype=torch.int64)).dtype == torch.bfloat16
