"""Judges pictures of a small closed set by the real picture that is nearest.

Where every combination of attributes has one real picture, the nearest of them says what a generated picture
shows. The judge knows the held-out pictures too: they are candidates like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class JudgeResult:
    """exact: share of pictures all of whose wanted attributes are those of the nearest real picture
    by_attribute: the same share for each attribute alone
    predicted: the attributes of the nearest real picture, for each picture
    """

    exact: float
    by_attribute: dict[str, float]
    predicted: list[dict[str, str]]


class NearestJudge:
    """Classification by the nearest real picture: pixel L2 at half resolution (2 x 2 pixels averaged, so that
    blur and fine noise count less). A picture that ignores its caption is right for 1 of N."""

    def __init__(self, images: Tensor, attributes: Sequence[dict[str, str]]) -> None:
        """images: (N, 3, H, W) in [-1, 1], H and W even; attributes: of each of them, with the same names."""
        if len(images) != len(attributes):
            raise ValueError(f"{len(images)} images but {len(attributes)} attributes")
        self.size_px = images.shape[-2:]
        self.references = _half_resolution(images)
        self.attributes = list(attributes)

    def judge(self, images: Tensor, wanted: Sequence[dict[str, str]]) -> JudgeResult:
        """images: (B, 3, H, W) in [-1, 1], of the size of the real ones; wanted: what each should show."""
        if len(images) != len(wanted) or len(images) == 0:
            raise ValueError(
                f"{len(images)} images but {len(wanted)} wanted; both must be equal and at least 1"
            )
        if images.shape[-2:] != self.size_px:
            raise ValueError(f"images are {tuple(images.shape[-2:])} px; the real ones {tuple(self.size_px)}")
        distance = torch.cdist(_half_resolution(images), self.references)
        predicted = [self.attributes[index] for index in distance.argmin(dim=1).tolist()]
        right = [
            {name: guess[name] == value for name, value in wish.items()}
            for guess, wish in zip(predicted, wanted, strict=True)
        ]
        return JudgeResult(
            exact=sum(all(answer.values()) for answer in right) / len(right),
            by_attribute={name: sum(answer[name] for answer in right) / len(right) for name in right[0]},
            predicted=predicted,
        )


def _half_resolution(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3 * H/2 * W/2) float32 on the CPU."""
    return F.avg_pool2d(images.detach().float().cpu().clamp(-1, 1), kernel_size=2).flatten(1)
