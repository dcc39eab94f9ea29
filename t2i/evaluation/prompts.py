"""Does a picture show what its prompt says? Counted over held-out prompts, by attribute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i.evaluation.nearest import JudgeResult, NearestJudge
from t2i.evaluation.shapes import judge_scenes
from t2i.interfaces import Batch

# (N, 3, H, W) in [-1, 1] and the N samples' JSON -> what holds
Judge = Callable[[Tensor, list[dict[str, Any]]], JudgeResult]


@dataclass(frozen=True)
class PromptResult:
    """images: (N, 3, H, W), drawn for the N held-out captions; result: the judge's word on them; real: the
    judge's word on the held-out pictures themselves, which bounds what can be reached."""

    images: Tensor
    result: JudgeResult
    real: JudgeResult


def judge_for(train: Batch, heldout: Batch) -> Judge | None:
    """The judge that fits the data: the exact checker for drawn scenes, the nearest picture where the JSON says
    `attributes`, None for other data."""
    if "scene" in heldout.metadata[0]:
        return judge_scenes
    if "attributes" not in heldout.metadata[0]:
        return None
    attributes = [sample["attributes"] for sample in [*train.metadata, *heldout.metadata]]
    nearest = NearestJudge(torch.cat([train.image, heldout.image]), attributes)
    return lambda images, metadata: nearest.judge(images, [sample["attributes"] for sample in metadata])


def follow_prompts(draw: Callable[[list[str]], Tensor], heldout: Batch, judge: Judge) -> PromptResult:
    """Draws one picture per held-out caption with `draw` (N captions -> (N, 3, H, W)) and judges it."""
    images = draw(heldout.caption)
    return PromptResult(images, judge(images, heldout.metadata), judge(heldout.image, heldout.metadata))

