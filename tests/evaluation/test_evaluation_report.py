"""The page, and the report end to end on drawn scenes and made-up runs."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.errors import DataError
from t2i.evaluation.page import Page
from t2i.evaluation.prompts import group_of
from t2i.evaluation.report import Run, psnr_db, write_report
from t2i.training.run_folder import write_config, write_summary


class Tags(HTMLParser):
    """Start tags with their attributes, and the text between tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def embedded_png(image: dict[str, str | None]) -> bytes:
    start = "data:image/png;base64,"
    source = image["src"]
    assert source is not None
    assert source.startswith(start)
    return base64.b64decode(source.removeprefix(start), validate=True)


def assert_stands_alone(path: Path) -> None:
    """Nothing on the page is loaded from anywhere."""
    read = Tags(path)
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "poster"):
                assert str(value).startswith("data:"), (tag, name, value)
    assert not re.search(r"url\(|@import", path.read_text())


# The page.

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


# PSNR.


def test_psnr_is_a_mean_over_pictures():
    image = torch.zeros(2, 3, 4, 4)
    offsets = torch.tensor([0.2, 0.02])[:, None, None, None]
    # peak 2: 20 log10(2 / 0.2) = 20 and 20 log10(2 / 0.02) = 40
    assert psnr_db(image, image + offsets) == pytest.approx(30.0, abs=1e-4)


def test_psnr_clamps_what_was_decoded():
    image = torch.ones(1, 3, 4, 4)
    decoded = torch.full((1, 3, 4, 4), 9.0)
    decoded[:, :, :2] = 0.8
    assert psnr_db(image, decoded) == pytest.approx(20 + 10 * np.log10(2), abs=1e-4)


def test_psnr_of_noise():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(4, 3, 128, 128)
    noise = 0.05 * torch.randn(image.shape, generator=generator)
    assert psnr_db(image, noise) == pytest.approx(10 * np.log10(4 / 0.05**2), abs=0.05)


def test_psnr_of_equal_pictures_is_finite():
    image = torch.zeros(1, 3, 2, 2)
    assert np.isfinite(psnr_db(image, image))


# The report.


def made_up_run(folder: Path, stage: str, size_px: int, shards: Path, seconds: float | None) -> Path:
    """A run folder with what the report reads. seconds None: it was killed before it could write anything."""
    folder.mkdir(parents=True)
    data = {
        "source": "shapes",
        "shards": [str(shards / "train" / "00000.tar")],
        "heldout_shards": [str(shards / "heldout" / "00000.tar")],
    }
    write_config(folder, {"stage": stage, "data": data, "resolution": {"size_px": size_px}})
    if seconds is not None:
        write_summary(folder, complete=True, images_seen=640, seconds=seconds)
        with (folder / "metrics.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "images", "loss", "l1", "discriminator"])
            rows.writerows([[10, 320, 1.0, 0.5, ""], [20, 640, 0.7, 0.3, 2.0]])
    return folder


class Fakes:
    """A codec that is 0.1 off, and a generator that draws the real picture for the first `right` prompts of
    each group and a gray nothing for the others."""

    def __init__(self, right: dict[str, int]) -> None:
        self.right = right
        self.prompts: dict[str, list[str]] = {}

    def reconstruct(self, folder: Path, images: torch.Tensor) -> torch.Tensor:
        assert folder.parent.name == "autoencoder"
        return images - 0.1 * images.sign()  # towards 0, so that nothing is clamped

    def draw(self, folder: Path, prompts: list[str]) -> torch.Tensor:
        (run,) = Run.read_all([folder])
        self.prompts[run.label] = prompts
        real = run.heldout(run.size_px)
        images, left = torch.zeros_like(real.image), dict(self.right)
        for i, sample in enumerate(real.metadata):
            group = group_of(sample)
            left[group] -= 1
            if left[group] >= 0:
                images[i] = real.image[i]
        return images


@pytest.fixture(scope="module")
def report(shapes_shards, tmp_path_factory) -> tuple[Path, dict, Fakes]:
    runs = tmp_path_factory.mktemp("runs")
    fakes = Fakes({"unseen": 6, "unseen_two_objects": 1})
    path = write_report(
        runs / "demo",
        made_up_run(runs / "autoencoder" / "a", "autoencoder", 64, shapes_shards, 12.5),
        [
            made_up_run(runs / "ldm" / "first <32>", "ldm", 32, shapes_shards, 100.0),
            made_up_run(runs / "ldm" / "second", "ldm", 64, shapes_shards, 50.0),
        ],
        fakes.reconstruct,
        fakes.draw,
    )
    return path, json.loads((path.parent / "report.json").read_text()), fakes


def test_figures(report):
    _, figures, _ = report
    assert figures["unseen_exact"] == 6 / 8
    assert figures["unseen_two_objects_exact"] == 1 / 4
    assert figures["unseen_exact_by_run"] == {"ldm-32": 6 / 8, "ldm-64": 6 / 8}
    assert set(figures["unseen_by_attribute"]) == {
        "count",
        "background",
        "shape",
        "colour",
        "size",
        "position",
    }
    assert set(figures["unseen_two_objects_by_attribute"]) == {
        *("count", "background", "shape", "colour", "size", "relation")
    }
    for name in ("count", "shape", "colour", "size", "position"):
        assert figures["unseen_by_attribute"][name] == 6 / 8
    assert figures["unseen_two_objects_by_attribute"]["relation"] == 1 / 4
    assert figures["psnr_db"] == pytest.approx(10 * np.log10(4 / 0.01), abs=0.02)
    seconds = figures["seconds"]
    assert seconds.pop("report") > 0
    assert seconds == {"autoencoder-64": 12.5, "ldm-32": 100.0, "ldm-64": 50.0}


def test_every_heldout_prompt_is_drawn(report):
    _, _, fakes = report
    assert {label: len(prompts) for label, prompts in fakes.prompts.items()} == {"ldm-32": 12, "ldm-64": 12}


def test_the_page_stands_alone(report):
    path, figures, _ = report
    assert path.name == "report.html"
    assert_stands_alone(path)
    read = Tags(path)
    names = [
        "data",
        "reconstructions",
        "samples_32",
        "samples_64",
        "loss_autoencoder-64",
        "loss_ldm-32",
        "loss_ldm-64",
    ]
    assert [embedded_png(image) for image in read.images] == [
        (path.parent / f"{name}.png").read_bytes() for name in names
    ]
    text = " ".join(read.text)
    assert f"{figures['psnr_db']} dB" in text
    assert "75.0%" in text
    assert "25.0%" in text
    assert "first <32>" in text  # escaped in the file, read back by the parser


def test_reconstructions_stand_below_their_pictures(report, shapes_shards):
    """Rows of 8 pictures of 64 px, gaps of 2 px, all enlarged twice: 8 pictures above their own."""
    path, _, _ = report
    sheet = Image.open(path.parent / "reconstructions.png")
    assert sheet.width == 2 * (8 * 64 + 7 * 2)
    centre = 2 * 32
    above = np.asarray(sheet.crop((0, 0, centre, centre)), dtype=float)
    below = np.asarray(sheet.crop((0, 2 * 66, centre, 2 * 66 + centre)), dtype=float)
    assert np.abs(np.abs(above - below) - 0.1 * 127.5).max() <= 1.5


def test_a_run_that_was_killed_is_reported_without_its_times(shapes_shards, tmp_path):
    fakes = Fakes({"unseen": 8, "unseen_two_objects": 4})
    path = write_report(
        tmp_path / "demo",
        made_up_run(tmp_path / "autoencoder" / "a", "autoencoder", 32, shapes_shards, 1.0),
        [made_up_run(tmp_path / "ldm" / "b", "ldm", 32, shapes_shards, None)],
        fakes.reconstruct,
        fakes.draw,
    )
    figures = json.loads((path.parent / "report.json").read_text())
    assert set(figures["seconds"]) == {"autoencoder-32", "report"}
    assert figures["unseen_exact"] == figures["unseen_two_objects_exact"] == 1.0


def test_a_run_without_heldout_shards_is_one_sentence(shapes_shards, tmp_path):
    folder = made_up_run(tmp_path / "autoencoder" / "a", "autoencoder", 32, shapes_shards, 1.0)
    (run,) = Run.read_all([folder])
    run.config["data"]["heldout_shards"] = None
    with pytest.raises(DataError, match=r"data\.heldout_shards"):
        run.heldout(32)


def test_runs_of_one_resolution_are_told_apart_by_their_folders(shapes_shards, tmp_path):
    folders = [
        made_up_run(tmp_path / "ldm" / name, "ldm", size, shapes_shards, 1.0)
        for name, size in (("a", 32), ("b", 64), ("c", 64))
    ]
    assert [run.label for run in Run.read_all(folders)] == ["ldm-32", "ldm-64-b", "ldm-64-c"]
