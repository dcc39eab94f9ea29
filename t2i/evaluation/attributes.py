"""How often drawn pictures show what their prompts say, counted as they are drawn."""

from __future__ import annotations

from t2i.evaluation.measure import Figure, share_figure
from t2i.evaluation.pictures import Item, stacked
from t2i.evaluation.prompts import Judge, group_of
from t2i.evaluation.suites import CATEGORIES

CHECKER = "exact checker"


class Attributes:
    """judge: see `t2i.evaluation.prompts.judge_for`. Items of the compositional suite name their category in
    metadata["category"]."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.answers: list[dict[str, bool]] = []
        self.groups: list[str] = []

    def look(self, items: list[Item]) -> None:
        """Judges a batch."""
        images = stacked(items).float() / 127.5 - 1
        metadata = [item.metadata for item in items]
        self.answers += self.judge(images, metadata)
        self.groups += [each.get("category") or group_of(each) for each in metadata]

    def figures(self) -> list[Figure]:
        """The shares of pictures in which all is right, each attribute, and of each group of prompts what it asks:
        of a category of the compositional suite its own attributes, else all of them."""
        exact = [all(answer.values()) for answer in self.answers]
        made = [share_figure("exact", exact, CHECKER)]
        for name in dict.fromkeys(name for answer in self.answers for name in answer):
            said = [answer[name] for answer in self.answers if name in answer]
            made.append(share_figure(f"attribute {name}", said, CHECKER))
        for group in dict.fromkeys(self.groups):
            own = [answer for answer, each in zip(self.answers, self.groups, strict=True) if each == group]
            right = [_right(group, answer) for answer in own]
            made.append(share_figure(f"category {group}", right, CHECKER))
        return made


def _right(group: str, answer: dict[str, bool]) -> bool:
    return all(answer[name] for name in CATEGORIES.get(group, tuple(answer)))
