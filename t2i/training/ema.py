"""Exponential moving average of trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from t2i.config import EMAConfig
from t2i.nn.precision import widened
from t2i.training.divided import own, put


class EMA:
    """Averages the given parameters and nothing else, so that frozen encoders and discriminators are neither
    copied nor stored. Kept in float32 at least, whatever the parameters' precision.

    After a step that saw B pictures, N in all: ema <- beta * ema + (1 - beta) * weights with
    beta = 2^(-B / h) and h = min(half_life_images, rampup_ratio * N) (EDM, 2206.00364, table 7 and code).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: EMAConfig) -> None:
        self.config = config
        self.parameters = dict(parameters)
        self.average = {n: widened(p.detach()).clone() for n, p in self.parameters.items()}

    def beta(self, batch_images: int, images_seen: int) -> float:
        """The share that the old average keeps after a step of `batch_images`, the last of `images_seen`."""
        half_life = float(self.config.half_life_images)
        if self.config.rampup_ratio is not None:
            half_life = min(half_life, self.config.rampup_ratio * images_seen)
        return 0.5 ** (batch_images / max(half_life, 1e-8))

    @torch.no_grad()
    def update(self, batch_images: int, images_seen: int) -> None:
        """Takes the present weights into the average."""
        share = 1 - self.beta(batch_images, images_seen)
        averages = [own(average) for average in self.average.values()]
        torch._foreach_lerp_(averages, [widened(own(p.detach())) for p in self.parameters.values()], share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters have the averaged values."""
        kept = {n: p.detach().clone() for n, p in self.parameters.items()}
        self._copy_into_parameters(self.average)
        try:
            yield
        finally:
            self._copy_into_parameters(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name."""
        return self.average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over averaged weights; the names must be those of the module's trained parameters."""
        if state.keys() != self.average.keys():
            raise KeyError(f"EMA names differ: {sorted(state.keys() ^ self.average.keys())[:5]}")
        for name, value in state.items():
            put(value, self.average[name])

    def to(self, device: torch.device) -> None:
        """Moves the averages to the device of the weights."""
        self.average = {n: v.to(device) for n, v in self.average.items()}

    @torch.no_grad()
    def _copy_into_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            own(parameter.detach()).copy_(own(values[name]))
