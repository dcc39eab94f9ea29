"""A row of pictures that lead from one to the next: side by side, and as a film."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from t2i.generation.manifest import Line
from t2i.generation.names import place_of, save_new
from t2i.generation.recipes import identity, together
from t2i.generation.video import Frames, write_film

FRAME_MS = 120
MOST = 64  # pictures side by side


def write_strip(folder: Path, lines: Sequence[Line]) -> list[Path]:
    """strip.png, the first `MOST` pictures side by side with all recipes, and strip.webp, all one after the other,
    over and over; where something else has such a name, under another one. lines: of the manifest"""
    recipe = together([{**line["recipe"], "prompt": line["prompt"], "seed": line["seed"]} for line in lines])
    still, is_there = place_of(folder / "strip.png", identity(recipe), is_fixed=False)
    pictures = Frames([folder / line["file"] for line in lines])
    if not is_there:
        shown = min(MOST, len(lines))
        sheet = Image.new("RGB", (shown * pictures.width, pictures.height))
        for i in range(shown):
            pictures.seek(i)
            sheet.paste(pictures, (i * pictures.width, 0))
        still, _ = save_new(sheet, folder / "strip.png", recipe)
    return [still, write_film([pictures], still.with_suffix(".webp"), FRAME_MS)]
