"""A model that draws at once, and a service over it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.generation.batch_size import BatchSize
from t2i.interfaces import Progress, SampleRequest
from t2i.schema import check, parse, to_dict
from t2i.serving.gallery import Features
from t2i.serving.service import Service
from t2i.serving.wanted import Limits


@dataclass(frozen=True)
class Sampling:
    steps: int = 3
    sampler: str = "euler"
    noise: float | None = None

    def __post_init__(self) -> None:
        check(self.steps >= 1, "sampling.steps", self.steps, "1 or more")


class Colours:
    """Draws one colour, as the prompt's first word says.

    drawn: the prompts, in the order in which they were drawn; requests: with what else was asked
    gate: lets it go on
    calls_before_the_gate: after so many calls it is shut
    """

    default_size_px = 8
    sampling = Sampling()

    def __init__(self) -> None:
        self.drawn: list[str] = []
        self.requests: list[SampleRequest] = []
        self.gate = threading.Event()
        self.gate.set()
        self.calls_before_the_gate = -1

    def check(self, request: SampleRequest, sampling: Sampling) -> None:
        check(sampling.steps <= 500, "sampling.steps", sampling.steps, "at most 500 with this model")
        check(request.height_px % 4 == 0, "height", request.height_px, "multiples of 4")

    def generate(self, request: SampleRequest, progress: Progress | None = None) -> Tensor:
        self.check(request, self.sampling)
        if self.calls_before_the_gate == 0:
            self.gate.clear()
        self.calls_before_the_gate -= 1
        self.drawn += request.prompts
        self.requests.append(request)
        for step in range(self.sampling.steps):
            assert self.gate.wait(10)
            if progress:
                progress(step + 1, self.sampling.steps)
        colours = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}
        colours |= {"broken": (float("nan"),) * 3}
        if any(prompt.startswith("bug") for prompt in request.prompts):
            raise ZeroDivisionError("a fault")
        rows = [torch.tensor(colours.get(prompt.partition(" ")[0], (0.0,) * 3)) for prompt in request.prompts]
        return torch.stack(rows)[:, :, None, None].expand(-1, -1, request.height_px, request.width_px).clone()


def words(prompts) -> Tensor:
    """One place per word of a small language, in which crimson is nearly red."""
    places = {
        "red": (1.0, 0.0, 0.0),
        "crimson": (0.9, 0.1, 0.0),
        "green": (0.0, 1.0, 0.0),
        "blue": (0.0, 0.0, 1.0),
    }
    rows = [[places.get(word, (0.0,) * 3) for word in prompt.split()] for prompt in prompts]
    return F.normalize(torch.tensor([[sum(axis) for axis in zip(*row, strict=True)] for row in rows]), dim=1)


FEATURES = Features(words, lambda images: F.normalize(images.mean((2, 3)), dim=1), 4, "words and colours")


@pytest.fixture
def features() -> Features:
    return FEATURES


@pytest.fixture
def make_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    made = []

    def make(features: Features | None = FEATURES, **limits: int) -> Service:
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        made.append(
            Service(
                Colours(),
                lambda changes: parse(Sampling, to_dict(Sampling()) | dict(changes), "sampling."),
                {"checkpoint": "a/run", "weights": "0123", "precision": "32-true"},
                folder,
                Limits(**limits),
                BatchSize(2, torch.device("cpu")),
                features,
            )
        )
        return made[-1]

    yield make
    for service in made:
        service.generator.gate.set()
        service.queue.close()
