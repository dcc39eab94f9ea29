"""How well a codec gives pictures back, and how it uses its codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # Wang et al. 2004


def psnr(image: Tensor, decoded: Tensor) -> Tensor:
    """(N,) in dB: 10 log10(peak^2 / MSE) of each picture, for (N, 3, H, W) in [-1, 1] (peak 2), clamped there."""
    mse = (image - decoded.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-12)
    return 10 * torch.log10(4 / mse)


def ssim(image: Tensor, decoded: Tensor) -> Tensor:
    """(N,) structural similarity (Wang et al. 2004, equation 13) of each picture, for (N, 3, H, W) in [-1, 1], sides of
    11 and more, clamped there: the mean over channels and over the places that a whole window of 11 x 11 fits."""
    x, y = image.double(), decoded.double().clamp(-1, 1)
    place = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    line = torch.exp(-(place**2) / (2 * SSIM_SIGMA**2))
    line = (line / line.sum()).to(x.device)
    channels = x.shape[1]

    def blurred(z: Tensor) -> Tensor:
        z = F.conv2d(z, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(z, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of a range of 2
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (likeness * structure).flatten(1).mean(1)


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """The share of the codes that came at all, and the perplexity of their frequencies (the number of codes where all
    come alike).

    counts: (num_codes,) how often each came
    """
    share = counts.double() / counts.sum()
    used = share[share > 0]
    return len(used) / len(counts), float(torch.exp(-(used * used.log()).sum()))
