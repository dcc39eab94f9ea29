"""A row of pictures that lead from one to the next: side by side, and as a film."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from t2i.generation.manifest import Line
from t2i.generation.names import place_of
from t2i.generation.recipes import chunk, identity, together
from t2i.generation.video import write_film
from t2i.training.pictures import save_picture

FRAME_MS = 120
MOST = 64  # pictures side by side


def write_strip(folder: Path, lines: Sequence[Line]) -> list[Path]:
    """strip.png, the first `MOST` pictures side by side with all recipes, and strip.webp, all one after the other,
    over and over. lines: of the manifest"""
    recipe = together([{**line["recipe"], "prompt": line["prompt"], "seed": line["seed"]} for line in lines])
    still, is_there = place_of(folder / "strip.png", identity(recipe), is_fixed=False)
    film = still.with_suffix(".webp")
    if is_there and film.exists():
        return [still, film]
    pictures = [folder / line["file"] for line in lines]
    opened = [Image.open(path, formats=["PNG"]).convert("RGB") for path in pictures]
    shown = opened[:MOST]
    sheet = Image.new("RGB", (sum(each.width for each in shown), max(each.height for each in shown)), "white")
    left = 0
    for each in shown:
        sheet.paste(each, (left, 0))
        left += each.width
    save_picture(sheet, still, **chunk(recipe))
    write_film(opened, film, FRAME_MS)
    return [still, film]
