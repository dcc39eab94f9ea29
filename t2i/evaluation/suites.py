"""Prompts to measure a model by: lines of text, COCO's captions, tables with categories."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.errors import DataError, shortened
from t2i.schema import is_unicode

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
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path} cannot be read: {error}.") from error
    prompts = reader(text, path, random.Random(seed))
    if not prompts:
        raise DataError(f"--prompts {path} holds no prompt.")
    for prompt in prompts:  # JSON can spell halves of characters
        if not is_unicode(prompt.text):
            raise DataError(
                f"--prompts {path} has the prompt {prompt.text!r}; allowed: text that UTF-8 can hold."
            )
    if count is None or count >= len(prompts):
        return prompts
    return random.Random(seed).sample(prompts, count)


def _coco(text: str, path: Path, rng: random.Random) -> list[Prompt]:
    try:
        annotations = json.loads(text)["annotations"]
        by_picture: dict[Any, list[str]] = {}
        for each in annotations:
            by_picture.setdefault(each["image_id"], []).append(each["caption"].strip())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
                f"--prompts {path}, line {number}, is {shortened(repr(line))}; allowed: an object with a text, as "
                '{"prompt": "a red circle"}.'
            ) from error
    return prompts


def _table(text: str, path: Path, rng: random.Random) -> list[Prompt]:
    names, *rows = (row.removesuffix("\r").split("\t") for row in text.split("\n"))
    if "Prompt" not in names:
        raise DataError(f"--prompts {path} has the columns {names}; allowed: Prompt, and Category.")
    prompts = []
    for number, row in enumerate(rows, 2):
        cells = dict(zip(names, row, strict=False))
        if prompt := cells.get("Prompt", "").strip():
            prompts.append(Prompt(prompt, cells.get("Category", "")))
        elif any(row):
            raise DataError(f"--prompts {path}, line {number}, has no text in the column Prompt.")
    return prompts


def _lines(text: str, path: Path, rng: random.Random) -> list[Prompt]:
    return [Prompt(line.strip()) for line in text.split("\n") if line.strip()]
