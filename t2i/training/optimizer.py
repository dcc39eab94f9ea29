"""The optimizer and its learning rate, as pure functions of images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t2i.config import OptimizerConfig
from t2i.training.adamw import AdamW
from t2i.training.divided import like
from t2i.training.muon import MuonAdamW


def build_optimizer(
    groups: Sequence[Iterable[nn.Parameter]], hidden_matrices: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, one per loss. Biases, norms and other vectors are not decayed.

    With config.muon_scale, `hidden_matrices` are stepped by Muon instead. Each of the optimizer's groups says
    in "rate_scale" by what its learning rate is multiplied.
    """
    muon = {id(p) for p in hidden_matrices} if config.muon_scale is not None else set()
    parameter_groups: list[dict[str, Any]] = []
    for group in groups:
        trained = [p for p in group if p.requires_grad]
        matrices = [p for p in trained if p.ndim >= 2 and id(p) not in muon]
        vectors = [p for p in trained if p.ndim < 2]
        hidden = [p for p in trained if id(p) in muon]
        parameter_groups += [
            _group(matrices, config.weight_decay),
            _group(vectors, 0.0),
            _group(hidden, config.weight_decay, muon_scale=config.muon_scale),
        ]
    optimizer = AdamW if config.muon_scale is None else MuonAdamW
    betas = (config.betas[0], config.betas[1])
    filled = [group for group in parameter_groups if group["params"]]
    made = optimizer(filled, lr=config.learning_rate, betas=betas, fused=True)
    made.register_load_state_dict_pre_hook(_as_parameters)
    return made


def _as_parameters(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved state with moments divided, and in memory, as the parameters are here."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = {
        number: {
            name: like(value, parameter.detach())
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for name, value in saved["state"].get(number, {}).items()
        }
        for number, parameter in zip(numbers, parameters, strict=True)
    }
    return saved | {"state": {number: values for number, values in state.items() if values}}


def _group(
    parameters: list[nn.Parameter], weight_decay: float, muon_scale: float | None = None
) -> dict[str, Any]:
    return {
        "params": parameters,
        "weight_decay": weight_decay,
        "muon": muon_scale is not None,
        "rate_scale": 1.0 if muon_scale is None else muon_scale,
    }


def learning_rate(config: OptimizerConfig, images_seen: int, num_images: int) -> float:
    """Linear warm-up over warmup_images, then constant, halved step by step, or a cosine to zero at num_images."""
    rate = config.learning_rate
    if config.halve_every_images is not None:
        rate *= 0.5 ** (images_seen // config.halve_every_images)
    if images_seen < config.warmup_images:
        return rate * (images_seen + 1) / config.warmup_images
    if config.schedule == "cosine":
        span = max(num_images - config.warmup_images, 1)
        rate *= 0.5 * (1 + math.cos(math.pi * min((images_seen - config.warmup_images) / span, 1.0)))
    return rate
