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

CHANCE_ROUNDS = 4

# (N, 3, H, W) in [-1, 1] and the N samples' JSON -> for each picture, which attributes it shows as asked
Judge = Callable[[Tensor, list[dict[str, Any]]], list[dict[str, bool]]]


@dataclass(frozen=True)
class PromptScore:
    """count: pictures judged; exact: share with every attribute right; by_attribute: the share of each among
    the pictures whose prompt names it."""

    count: int
    exact: float
    by_attribute: dict[str, float]


@dataclass(frozen=True)
class GroupScore:
    """Of one group of prompts: the drawn pictures; the real ones, the bound from above; and real pictures of other
    prompts, the level of chance (None where there is one prompt in all)."""

    drawn: PromptScore
    real: PromptScore
    chance: PromptScore | None

    def to_json(self) -> dict[str, Any]:
        drawn, real, chance = self.drawn, self.real, self.chance
        scores = {"real": real} | ({} if chance is None else {"chance": chance})
        values: dict[str, Any] = {"count": drawn.count, **_shares(drawn)}
        return values | {name: _shares(each) for name, each in scores.items()}


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


def score_groups(judge: Judge, images: Tensor, unseen: Batch) -> dict[str, GroupScore]:
    """The scores of drawn pictures by group of prompts.

    images: (N, 3, H, W) in [-1, 1], drawn for the N held-out prompts in `unseen`
    """
    drawn, real = judge(images, unseen.metadata), judge(unseen.image, unseen.metadata)
    others = [judge(unseen.image[other], unseen.metadata) for other in derangements(len(unseen))]
    groups = [group_of(sample) for sample in unseen.metadata]

    def of(name: str, *rounds: list[dict[str, bool]]) -> PromptScore:
        pairs = (pair for answers in rounds for pair in zip(answers, groups, strict=True))
        return score([answer for answer, group in pairs if group == name])

    return {
        name: GroupScore(of(name, drawn), of(name, real), of(name, *others) if others else None)
        for name in dict.fromkeys(groups)
    }


def derangements(count: int) -> list[Tensor]:
    """Up to CHANCE_ROUNDS ways to give each of `count` prompts the picture of another, over all groups: (count,)
    int64. Always the same ones, none of them in the order of the samples."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    made = []
    for shift in range(1, min(CHANCE_ROUNDS + 1, count)):
        other = torch.empty_like(order)
        other[order] = order.roll(shift)
        made.append(other)
    return made


def _shares(of: PromptScore) -> dict[str, Any]:
    return {"exact": of.exact, "by_attribute": of.by_attribute}
