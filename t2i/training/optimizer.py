"""The optimizer and its learning rate, as pure functions of images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from t2i.config import OptimizerConfig


def build_adamw(groups: Sequence[Iterable[nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over groups of parameters, one per loss. Biases, norms and other vectors are not decayed."""
    parameter_groups = []
    for group in groups:
        trained = [p for p in group if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2]
        vectors = [p for p in trained if p.ndim < 2]
        parameter_groups.append({"params": matrices, "weight_decay": config.weight_decay})
        parameter_groups.append({"params": vectors, "weight_decay": 0.0})
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(
        [g for g in parameter_groups if g["params"]], lr=config.learning_rate, betas=betas
    )


def learning_rate(config: OptimizerConfig, images_seen: int, num_images: int) -> float:
    """Linear warm-up over warmup_images, then constant, or a cosine to zero at num_images."""
    rate = config.learning_rate
    if images_seen < config.warmup_images:
        return rate * (images_seen + 1) / config.warmup_images
    if config.schedule == "cosine":
        span = max(num_images - config.warmup_images, 1)
        rate *= 0.5 * (1 + math.cos(math.pi * min((images_seen - config.warmup_images) / span, 1.0)))
    return rate
