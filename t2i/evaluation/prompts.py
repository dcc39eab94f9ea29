"""Does a picture show what its prompt says? Counted over held-out prompts, by attribute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i.evaluation.nearest import NearestJudge
from t2i.evaluation.shapes import Scene, check
from t2i.interfaces import Batch

# (N, 3, H, W) in [-1, 1] and the N samples' JSON -> for each picture, which attributes it shows as asked
Judge = Callable[[Tensor, list[dict[str, Any]]], list[dict[str, bool]]]


@dataclass(frozen=True)
class PromptScore:
    """count: pictures judged; exact: share with every attribute right; by_attribute: the share of each among
    the pictures whose prompt names it."""

    count: int
    exact: float
    by_attribute: dict[str, float]


def judge_for(read_train: Callable[[], Batch], heldout: Batch) -> Judge | None:
    """The judge that fits the data: the exact checker for drawn scenes, the nearest of all real pictures
    where the JSON names `attributes`, None for other data. All pictures are of the size that will be judged;
    those of the training data are read only where the judge needs them."""
    if "scene" in heldout.metadata[0]:
        return check_scenes
    if "attributes" not in heldout.metadata[0]:
        return None
    train = read_train()
    attributes = [sample["attributes"] for sample in [*train.metadata, *heldout.metadata]]
    nearest = NearestJudge(torch.cat([train.image, heldout.image]), attributes)

    def judge(images: Tensor, metadata: list[dict[str, Any]]) -> list[dict[str, bool]]:
        pairs = zip(nearest.predict(images), metadata, strict=True)
        return [{k: shown[k] == v for k, v in sample["attributes"].items()} for shown, sample in pairs]

    return judge


def check_scenes(images: Tensor, metadata: list[dict[str, Any]]) -> list[dict[str, bool]]:
    """The judge of drawn scenes; see `t2i.evaluation.shapes.check`."""
    return [
        check(image, Scene.from_json(sample["scene"])) for image, sample in zip(images, metadata, strict=True)
    ]


def score(answers: Sequence[dict[str, bool]]) -> PromptScore:
    """The shares over one or more judged pictures."""
    names = dict.fromkeys(name for answer in answers for name in answer)
    said = {name: [answer[name] for answer in answers if name in answer] for name in names}
    return PromptScore(
        count=len(answers),
        exact=sum(all(answer.values()) for answer in answers) / len(answers),
        by_attribute={name: sum(values) / len(values) for name, values in said.items()},
    )


def group_of(sample: dict[str, Any]) -> str:
    """The group that a sample is counted in: drawn scenes by their number of objects, others all together."""
    if "scene" not in sample:
        return "unseen"
    return {1: "unseen", 2: "unseen_two_objects", 3: "unseen_three_objects"}[len(sample["scene"]["objects"])]
