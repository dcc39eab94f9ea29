"""The page: one HTML file with everything inside, escaped."""

from __future__ import annotations

import io

import numpy as np
import torch
from html_pages import Tags, assert_stands_alone, embedded_png
from PIL import Image

from t2i.evaluation.page import Page

NASTY = """<script>alert("1")</script> & 'it' {braces}"""


def test_everything_said_is_escaped(tmp_path):
    page = Page(tmp_path, NASTY)
    page.heading(NASTY)
    page.paragraph(NASTY)
    page.commands([NASTY, "second"])
    page.table([(NASTY, "1")], header=(NASTY, "n"))
    page.picture("p", torch.zeros(3, 2, 2), NASTY)
    path = page.write("page.html")
    assert_stands_alone(path)
    read = Tags(path)
    assert (
        sum(NASTY in text for text in read.text) == 7
    )  # title, heading, paragraph, commands, two cells, caption
    assert read.images[0]["alt"] == NASTY
    assert [text for text in read.text if text.endswith("\nsecond")]


def test_a_picture_is_embedded_and_beside_the_page(tmp_path):
    image = torch.linspace(-1, 1, 3 * 2 * 3).reshape(3, 2, 3)
    page = Page(tmp_path, "t")
    page.picture("small", image, "caption", enlarge=4)
    path = page.write("page.html")
    (embedded,) = Tags(path).images
    data = embedded_png(embedded)
    assert data == (tmp_path / "small.png").read_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == (8, 12, 3)
    expected = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
    for y, x in np.ndindex(8, 12):
        assert np.array_equal(pixels[y, x], expected[y // 4, x // 4])


def test_a_plot_is_embedded(tmp_path):
    page = Page(tmp_path, "t")
    page.plot("line", "caption", lambda axes: axes.plot([0, 1], [1, 0]))
    (embedded,) = Tags(page.write("page.html")).images
    assert embedded["class"] == "plot"
    picture = Image.open(io.BytesIO(embedded_png(embedded)))
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 2  # something is drawn


def test_a_table_has_its_cells_in_order(tmp_path):
    page = Page(tmp_path, "t")
    page.table([("a", "1"), ("b", "2")], header=("name", "value"))
    read = Tags(page.write("page.html"))
    assert [tag for tag, _ in read.tags if tag in ("tr", "td", "th")] == [
        "tr",
        "th",
        "th",
        *["tr", "td", "td"] * 2,
    ]
    assert [text for text in read.text if text in ("name", "value", "a", "1", "b", "2")] == [
        "name",
        "value",
        "a",
        "1",
        "b",
        "2",
    ]
