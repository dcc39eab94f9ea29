"""Prompts to measure a model by: lines of text, COCO's captions, tables with categories."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.errors import DataError

# Of a scene's prompt in the compositional suite: what has to be right for its category.
CATEGORIES = {
    "counts": ("count",),
    "colours": ("colour",),
    "positions": ("position",),
    "relations": ("relation",),
    "sizes": ("size",),
    "binding": ("shape", "colour"),
}


@dataclass(frozen=True)
class Prompt:
    """category: "" where the suite has none; metadata: the sample's JSON, with the scene where there is one"""

    text: str
    category: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


def read_suite(path: Path, count: int | None, seed: int = 0) -> list[Prompt]:
    """
    path: a .json of COCO's captions ({"annotations": [{"image_id": ..., "caption": ...}]}), of which one of each
        picture is drawn; a .jsonl of objects with `prompt`; a .tsv with a header as PartiPrompts has it (Prompt,
        Category, Challenge); a .txt, or a file without an ending, of one prompt per line
    count: so many of them, drawn by `seed` where there are more; None: all, in their order
    Raises DataError for a file that is not there, has another ending or no prompts.
    """
    readers = {".json": _coco, ".jsonl": _objects, ".tsv": _table, ".txt": _lines, "": _lines}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"--prompts {path} ends in {path.suffix}; allowed: .json, .jsonl, .tsv or .txt.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path} cannot be read: {error}.") from error
    prompts = reader(text, path, random.Random(seed))
    if not prompts:
        raise DataError(f"--prompts {path} holds no prompt.")
    if count is None or count >= len(prompts):
        return prompts
    return random.Random(seed).sample(prompts, count)


def _coco(text: str, path: Path, rng: random.Random) -> list[Prompt]:
    try:
        annotations = json.loads(text)["annotations"]
        by_picture: dict[Any, list[str]] = {}
        for each in annotations:
            by_picture.setdefault(each["image_id"], []).append(each["caption"].strip())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"--prompts {path} is not COCO's captions ({type(error).__name__}: {error}); allowed: "
            '{"annotations": [{"image_id": 1, "caption": "..."}, ...]}.'
        ) from error
    return [Prompt(rng.choice(captions)) for captions in by_picture.values()]


def _objects(text: str, path: Path, rng: random.Random) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(Prompt(json.loads(line)["prompt"].strip()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(
                f"--prompts {path}, line {number}, is no object with a prompt ({type(error).__name__}: {error}); "
                'allowed: {"prompt": "a red circle"}.'
            ) from error
    return prompts


def _table(text: str, path: Path, rng: random.Random) -> list[Prompt]:
    rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    if "Prompt" not in (rows.fieldnames or []):
        raise DataError(f"--prompts {path} has the columns {rows.fieldnames}; allowed: Prompt, and Category.")
    return [Prompt(row["Prompt"].strip(), row.get("Category") or "") for row in rows if row["Prompt"]]


def _lines(text: str, path: Path, rng: random.Random) -> list[Prompt]:
    return [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
