"""What a codec gives back, and how it uses its codes."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from t2i.evaluation.reconstruction import codebook_use, psnr, ssim


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 3, 24, 20, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    return image, (image + torch.tensor([0.02, 0.1, 0.5])[:, None, None, None] * noise).clamp(-1, 1)


def test_psnr_and_ssim_are_torchmetrics():
    image, decoded = pair()
    for i in range(3):
        one, other = image[i : i + 1], decoded[i : i + 1]
        _, everywhere = structural_similarity_index_measure(
            other, one, data_range=2.0, return_full_image=True
        )
        expected = everywhere[..., 5:-5, 5:-5].mean()  # where no window reaches into their padding
        assert float(ssim(one, other)) == pytest.approx(float(expected), abs=1e-9)
        assert float(psnr(one, other)) == pytest.approx(
            float(peak_signal_noise_ratio(other, one, data_range=2.0))
        )
    assert ssim(image, image) == pytest.approx(torch.ones(3))


def test_the_use_of_codes():
    usage, perplexity = codebook_use(torch.tensor([5, 5, 5, 5, 0, 0]))
    assert (usage, perplexity) == pytest.approx((4 / 6, 4.0))
    _, perplexity = codebook_use(torch.tensor([3, 1]))
    assert perplexity == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
