"""Of several pictures for a prompt, the one that fits it best (DALL-E, 2102.12092, section 2.6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from t2i.config import check
from t2i.interfaces import Generator, Progress, SampleRequest

AT_A_TIME = 16  # candidates
Score = Callable[[Tensor, Sequence[str]], Tensor]


class Reranked:
    """A generator that draws `count` candidates for each picture, and keeps the one with the highest score.

    score: pictures (N, 3, H, W) in [-1, 1] and their prompts -> (N,). The first of equal ones is kept; one that is not
        finite only where all are
    The candidates of a picture with seed s have the seeds s * count up to s * count + count - 1.
    """

    def __init__(self, generator: Generator, count: int, score: Score) -> None:
        self.generator, self.count, self.score = generator, count, score
        self.default_size_px, self.precision = generator.default_size_px, generator.precision

    @property
    def sampling(self) -> Any:
        return self.generator.sampling

    @sampling.setter
    def sampling(self, sampling: Any) -> None:
        self.generator.sampling = sampling

    def compile(self) -> None:
        self.generator.compile()

    def check(self, request: SampleRequest, sampling: Any) -> None:
        check(request.noise is None, "--rerank", self.count, "without --invert")
        self.generator.check(request, sampling)

    def invert(self, request: SampleRequest, progress: Progress | None = None) -> Tensor:
        return self.generator.invert(request, progress)

    def generate(self, request: SampleRequest, progress: Progress | None = None) -> Tensor:
        """See `t2i.interfaces.Generator`."""
        self.check(request, self.sampling)
        return torch.cat([self._best(request, i, progress) for i in range(len(request.prompts))])

    def _best(self, request: SampleRequest, place: int, progress: Progress | None) -> Tensor:
        first, best = request.seeds[place] * self.count, None
        for start in range(0, self.count, AT_A_TIME):
            number = min(AT_A_TIME, self.count - start)
            seeds = [(first + start + i) % 2**63 for i in range(number)]
            part = dataclasses.replace(request.rows([place] * number), seeds=seeds)
            images = self.generator.generate(part, progress)
            finite = images.isfinite().flatten(1).all(1)
            scores = self.score(images.nan_to_num(0), part.prompts).cpu()
            scores = torch.where(finite, scores.double(), -torch.inf)
            winner = int(scores.argmax())
            if best is None or scores[winner] > best[0]:
                best = scores[winner], images[winner : winner + 1]
        assert best is not None
        return best[1]
