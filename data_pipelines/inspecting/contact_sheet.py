"""A grid of samples, each with its caption below, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from .facts import Tile

GAP_PX = 12
FONT_PX = 13
LINE_PX = 17
MAX_LINES = 4
INK, PALE, FRAME = "#202020", "#808080", "#d0d0d0"


def contact_sheet(tiles: Sequence[Tile], tile_px: int) -> Image.Image:
    """RGB. Captions are cut after MAX_LINES lines; what the font lacks (Chinese, emoji) is drawn as boxes."""
    # Simple layout, because the other one is there on some machines only.
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), FONT_PX, layout_engine=ImageFont.Layout.BASIC)
    columns = max(1, math.ceil(math.sqrt(len(tiles) * 1.5)))
    rows = math.ceil(len(tiles) / columns)
    captions = [wrapped(tile.caption, font, tile_px) for tile in tiles]
    heights = [
        tile_px + GAP_PX + LINE_PX * max(map(len, captions[row * columns : (row + 1) * columns]))
        for row in range(rows)
    ]
    sheet = Image.new("RGB", (GAP_PX + columns * (tile_px + GAP_PX), GAP_PX + sum(heights) + GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        left = GAP_PX + i % columns * (tile_px + GAP_PX)
        top = GAP_PX + sum(heights[: i // columns])
        _draw_picture(sheet, draw, tile, (left, top), tile_px, font)
        for number, line in enumerate(lines):
            draw.text((left, top + tile_px + 3 + number * LINE_PX), line, fill=INK, font=font)
    return sheet


def _draw_picture(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    tile: Tile,
    place: tuple[int, int],
    tile_px: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    left, top = place
    if tile.picture is None:
        draw.rectangle((left, top, left + tile_px - 1, top + tile_px - 1), outline=FRAME)
        for number, line in enumerate(wrapped(tile.note, font, tile_px - 2 * GAP_PX)):
            draw.text((left + GAP_PX, top + GAP_PX + number * LINE_PX), line, fill=PALE, font=font)
        return
    width, height = tile.picture.size
    left, top = left + (tile_px - width) // 2, top + (tile_px - height) // 2
    sheet.paste(tile.picture, (left, top))
    draw.rectangle((left - 1, top - 1, left + width, top + height), outline=FRAME)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """At most MAX_LINES lines that fit; the last one ends in "…" where the text goes on."""
    # Half a surrogate pair cannot be drawn, nor can NUL; JSON may hold both.
    drawable = text[:1000].encode("utf-8", "replace").decode().replace("\0", " ")
    lines = [""]
    for word in drawable.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width_px:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:  # a word too long for a line, or text without spaces
            if lines[-1] and font.getlength(lines[-1] + letter) > width_px:
                lines.append("")
            lines[-1] += letter
        if len(lines) > MAX_LINES:
            break
    if len(lines) <= MAX_LINES:
        return lines if lines[0] else []
    last = lines[MAX_LINES - 1]
    while last and font.getlength(f"{last}…") > width_px:
        last = last[:-1]
    return [*lines[: MAX_LINES - 1], f"{last}…"]
