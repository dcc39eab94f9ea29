"""What is measured of pictures that a run draws while it trains: exact attributes, a distance over small features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from t2i.evaluation.distances import Gaussian, frechet
from t2i.evaluation.features import load
from t2i.evaluation.prompts import judge_for, score
from t2i.interfaces import Batch
from t2i.training.pictures import to_uint8

AT_A_TIME = 64


class DrawnFigures:
    """Over few pictures: the distance tells the checkpoints of one run apart, and is no figure to publish."""

    def __init__(self, heldout: Batch, read_train: Callable[[], Batch]) -> None:
        """heldout: real pictures of the prompts that are drawn; read_train: see `judge_for`"""
        self.heldout = heldout
        self.judge = judge_for(read_train, heldout)
        self.extractor = load("efficientnet", "clean", torch.device("cpu"))
        self.reference = Gaussian.of(self._features(heldout.image))

    def __call__(self, images: Tensor) -> dict[str, float]:
        """(N, 3, H, W) in [-1, 1], drawn for the held-out prompts -> figures by name."""
        figures = {"drawn_fd_efficientnet": frechet(self.reference, Gaussian.of(self._features(images)))}
        if self.judge is not None:
            found = score(self.judge(images.float().cpu(), self.heldout.metadata))
            figures["drawn_exact"] = found.exact
            figures |= {f"drawn_{name}": share for name, share in found.by_attribute.items()}
        return figures

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.extractor(part) for part in to_uint8(images).split(AT_A_TIME)])
