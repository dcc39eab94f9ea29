"""The runs of a report side by side, as rows of text: for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_THE_SAME = "These runs were not judged by the same held-out prompts: their shares do not compare."
FIGURES = {
    "parameters": "parameters of the trained networks",
    "parameters_in_all": "parameters with those of the runs that it builds on",
    "seconds": "seconds of training",
    "seconds_in_all": "seconds with the runs that it continues and builds on",
}


def same_prompts(runs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether those of `runs` (the entry "runs" of report.json) that were judged were judged by the same prompts."""
    return len({run["prompts"] for run in runs.values() if run["groups"]}) <= 1


def comparison(runs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of cells, the header first: a column for each run, and where all were judged by the same prompts one for the
    level of chance and one for the real pictures.

    runs: the entry "runs" of report.json
    """
    groups = dict.fromkeys(group for run in runs.values() for group in run["groups"])
    bounds = {"chance": "chance", "real": "real pictures"} if groups and same_prompts(runs) else {}
    rows = [["", *runs, *bounds.values()]]
    for group in groups:
        scores = [run["groups"].get(group, {}) for run in runs.values()]
        last = next(score for score in reversed(scores) if score)
        columns = [*scores, *(last.get(name, {}) for name in bounds)]
        rows.append([f"{spoken(group)}: exactly right", *(share(each.get("exact")) for each in columns)])
        for name in dict.fromkeys(name for score in scores for name in score.get("by_attribute", {})):
            shares = (each.get("by_attribute", {}).get(name) for each in columns)
            rows.append([f"{spoken(group)}: {name}", *map(share, shares)])
    for key, words in FIGURES.items():
        values = [run[key] for run in runs.values()]
        rows.append([words, *("-" if value is None else f"{value:,.0f}" for value in values)])
    return [row + [""] * (len(rows[0]) - len(row)) for row in rows]


def spoken(group: str) -> str:
    """A group of prompts as text: "unseen_two_objects" as "Unseen two objects"."""
    return group.replace("_", " ").capitalize()


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
