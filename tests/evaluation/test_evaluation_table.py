"""Tables and curves of runs that were measured."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
from PIL import Image

from t2i.errors import DataError
from t2i.evaluation import table
from t2i.evaluation.curves import Point, as_csv, encoders, intervals, said_of, series, write_curves
from t2i.evaluation.measure import Figure
from t2i.evaluation.published import PUBLISHED
from t2i.evaluation.table import comparison_rows, markdown, notes, with_interval, write_tables

ABOUT = {
    "run": "runs/a|b",
    "type": "some",
    "size_px": 32,
    "parameters": 1234,
    "training_images": None,
    "seconds_per_picture": 0.12345,
    "memory_gib": 1.0,
}
FIGURES = [
    Figure("FID", 12.5, (10.5, 14.5), 100, "Inception, resize clean", 50),
    Figure("KID x 1000", 1.0, None, 100, "Inception, resize clean", 50),
    Figure("exact", 0.5, (0.4, 0.6), 100, "exact checker"),
]


def point(
    run: str, clip: float, fid: float, encoder: tuple[str, int] = ("small", 10), **options: str
) -> Point:
    figures = [Figure("FID", fid, (fid - 1, fid + 1), 10, "x", 10), Figure("CLIP score", clip, None, 10, "y")]
    about = {"text_encoder": encoder[0], "text_encoder_parameters": encoder[1], "seconds_per_picture": 0.5}
    return Point(run, options, about, figures)


def test_every_kind_that_draws_has_a_published_row():
    kinds = {"latent diffusion", "pixel diffusion", "autoregressive codes", "masked codes", "GAN"}
    assert kinds <= {each.type for each in PUBLISHED}


def test_a_row_for_each_run_and_the_published_ones_marked(tmp_path):
    other = ABOUT | {"run": "runs/c", "size_px": 64, "training_images": 5000}
    runs = [(ABOUT, FIGURES), (other, FIGURES[1:])]
    header, first, second, *published = comparison_rows(runs, published=True)
    row = dict(zip(header, first, strict=True))
    assert row == {
        "model": "runs/a|b",
        "type": "some, 32 px",
        "parameters": "1,234",
        "training images": "-",
        "FID": "12.5 ± 2",
        "exact": "0.5 ± 0.1",
        "FID as published": "-",
        "s / picture": "0.123",
        "GiB": "1.00",
        "pictures": "100",
        "source": "measured here",
    }
    assert dict(zip(header, second, strict=True))["FID"] == "-"
    assert len(published) == len(PUBLISHED)
    assert all(dict(zip(header, each, strict=True))["source"].startswith("published, ") for each in published)
    assert all(dict(zip(header, each, strict=True))["FID"] == "-" for each in published)
    assert "FID as published" not in comparison_rows(runs, published=False)[0]
    assert notes(runs)[0] == "FID: Inception, resize clean."
    assert "several sizes" in notes(runs)[-1]
    rows = comparison_rows(runs, published=True)
    paths = write_tables(rows, notes(runs), table.as_csv(runs, published=True), tmp_path)
    numbers = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert len(numbers) == len(rows) - 1
    first = numbers[0]
    assert (first["run"], first["parameters"], first["pictures"], first["training_images"]) == (
        "runs/a|b",
        "1234",
        "100",
        "",
    )
    assert [first[f"exact{end}"] for end in ("", " low", " high")] == ["0.5", "0.4", "0.6"]
    assert (numbers[1]["FID"], numbers[1]["exact"]) == ("", "0.5")
    assert (numbers[-1]["FID"], float(numbers[-1]["FID as published"])) == ("", PUBLISHED[-1].fid)
    assert all(each["source"].startswith("published, ") for each in numbers[2:])
    assert len(table.as_csv(runs, published=False).splitlines()) == 3
    lines = paths[0].read_text().splitlines()
    assert lines[0] == f"| {' | '.join(header)} |"
    assert "runs/a\\|b" in lines[2]
    assert {line.count(" | ") for line in markdown(rows).splitlines()} == {len(header) - 1}
    assert Image.open(paths[2]).width > 300


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (0.5, (0.4, 0.6), "0.5 ± 0.1"),
        (0.0, (0.0, 0.0566), "0 (0 to 0.057)"),
        (0.98, (0.92, 1.0), "0.98 (0.92 to 1)"),
        (3.0, None, "3"),
    ],
)
def test_an_interval_that_lies_to_one_side_is_said_by_its_ends(value, interval, text):
    assert with_interval(Figure("exact", value, interval, 64)) == text


def test_points_are_read_as_they_were_written(tmp_path):
    one = point("runs/a", 20.0, 50.0, steps="10")
    one.write(tmp_path / "a.json")
    found = Point.read(tmp_path / "a.json")
    assert found.options == one.options
    assert found.distance.value == 50.0
    assert list(found.distance.interval_95) == [49.0, 51.0]
    values = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps({key: values[key] for key in ("run", "options")}))
    with pytest.raises(DataError, match=r"b\.json is no point of a sweep"):
        Point.read(tmp_path / "b.json")


def test_the_first_option_runs_along_a_line(tmp_path):
    points = [
        point(run, 20 + float(scale), 50 - float(scale), guidance_scale=scale, steps=steps)
        for run in ("runs/a", "runs/b")
        for scale in ("1.5", "3")
        for steps in ("10", "50")
    ]
    assert {name: len(line) for name, line in series(points).items()} == {
        f"runs/{run} steps={steps}": 2 for run in "ab" for steps in ("10", "50")
    }
    rows = list(csv.DictReader(as_csv(points).splitlines()))
    assert (len(rows), rows[0]["guidance_scale"], rows[0]["FID"], rows[0]["FID low"]) == (
        8,
        "1.5",
        "48.5",
        "47.5",
    )
    assert write_curves(points, tmp_path) == [tmp_path / "sweep.csv", tmp_path / "sweep.png"]
    without = [dataclasses.replace(each, figures=each.figures[:1]) for each in points]
    write_curves(without, tmp_path)  # over the option itself
    assert Image.open(tmp_path / "sweep.png").width > 300
    assert intervals(points[:2]) == [[1.0, 1.0], [1.0, 1.0]]  # below and above
    assert said_of(points[0].distance) == "FID, 10 pictures, 95% interval"
    none = dataclasses.replace(points[0], figures=[Figure("FID", 5.0, None, 10)])
    assert (intervals([none]), said_of(none.distance)) == ([[0.0], [0.0]], "FID, 10 pictures")
    write_curves([none], tmp_path)


def test_the_best_point_of_each_text_encoder(tmp_path):
    points = [
        point("runs/a", 20, 50, ("small", 10), steps="1"),
        point("runs/a", 20, 40, ("small", 10), steps="2"),
        point("runs/b", 20, 30, ("large", 1000), steps="1"),
    ]
    assert {name: (size, best.distance.value) for name, (size, best) in encoders(points).items()} == {
        "small": (10, 40),
        "large": (1000, 30),
    }
    assert encoders(points[:2]) == {}
    assert tmp_path / "encoders.png" in write_curves(points, tmp_path)
