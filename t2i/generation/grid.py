"""Pictures of a folder on one sheet, each with its prompt beneath."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MOST = 64  # pictures on a sheet
COLUMNS = 8
LEAST_WIDTH_PX = 128  # of a column, that a caption can be read
GAP_PX, LINE_PX, FONT_PX, LINES = 4, 13, 11, 3


def captioned_grid(paths: Sequence[Path], prompts: Sequence[str]) -> Image.Image:
    """An RGB picture: as many columns as the square root of their number, up to COLUMNS; white around. Captions of more
    than LINES lines end in "...". Pictures of several sizes stand in cells of the largest."""
    sizes = []
    for path in paths:
        with Image.open(path) as picture:
            sizes.append(picture.size)
    columns = min(COLUMNS, math.ceil(math.sqrt(len(paths))))
    width = max(LEAST_WIDTH_PX, *(size[0] for size in sizes))
    tall = max(size[1] for size in sizes)
    height = tall + GAP_PX + LINES * LINE_PX
    rows = -(-len(paths) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + GAP_PX) + GAP_PX, rows * (height + GAP_PX) + GAP_PX), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for i, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        row, column = divmod(i, columns)
        left, top = GAP_PX + column * (width + GAP_PX), GAP_PX + row * (height + GAP_PX)
        with Image.open(path) as picture:
            sheet.paste(picture, (left + (width - picture.width) // 2, top))
        for number, line in enumerate(wrapped(prompt, width, font)):
            draw.text((left, top + tall + GAP_PX + number * LINE_PX), line, "black", font)
    return sheet


def wrapped(
    text: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int = LINES
) -> list[str]:
    """At most so many lines of that width. Words that are wider than a line are cut."""
    lines: list[str] = [""]
    for word in text[:1000].split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width_px:
            lines[-1] = longer
        elif len(lines) == most:
            lines[-1] += " ..."
            break
        else:
            lines.append(word)
    return [_cut(line, width_px, font) for line in lines]


def _cut(line: str, width_px: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width_px:
        return line
    while line and font.getlength(f"{line}...") > width_px:
        line = line[:-1]
    return f"{line}..."
