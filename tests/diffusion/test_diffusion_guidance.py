import pytest
import torch
from torch import Tensor

from t2i.diffusion.guidance import classifier_free, guided
from t2i.interfaces import TextFeatures

pytestmark = pytest.mark.usefixtures("float64")


def features(seed: int) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 4, 3, generator=g)
    return TextFeatures(tokens, torch.randn(2, 3, generator=g), torch.rand(2, 4, generator=g) > 0.3)


class Model:
    """Depends on every input; remembers the batch sizes it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.batches.append(len(x))
        assert len(x) == len(t) == len(text)
        context = (text.tokens * text.mask[..., None]).sum((1, 2)) + text.pooled.sum(1)
        return torch.tanh(x + (t * context)[:, None])


X, T = torch.linspace(-1, 1, 10).view(2, 5), torch.tensor([0.3, 0.8])


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance_extrapolates_from_uncond_to_cond(scale):
    cond, uncond = features(0), features(1)
    out_cond, out_uncond = Model()(X, T, cond), Model()(X, T, uncond)
    assert not torch.allclose(out_cond, out_uncond)
    result = classifier_free(Model(), cond, uncond, scale)(X, T)
    torch.testing.assert_close(result, (1 - scale) * out_uncond + scale * out_cond)
    torch.testing.assert_close(guided(out_cond, out_uncond, scale), result)


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 2), (3.0, 4), (0.0, 4)])
def test_one_call_of_the_model_and_no_uncond_half_at_scale_1(scale, batch):
    model = Model()
    classifier_free(model, features(0), features(1), scale)(X, T)
    assert model.batches == [batch]
