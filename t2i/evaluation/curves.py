"""Curves over the options of sampling: the distance against the CLIP score, as Imagen and Stable Diffusion published
theirs, and against the size of the text encoder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.errors import DataError
from t2i.evaluation.measure import Figure
from t2i.evaluation.table import is_distance
from t2i.few import plural
from t2i.files import written_whole


@dataclass(frozen=True)
class Point:
    """One run or checkpoint with one choice of options; about: see `t2i evaluate`'s JSON"""

    run: str
    options: dict[str, str]
    about: dict[str, Any]
    figures: list[Figure]

    def named(self, name: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.name == name), None)

    @property
    def distance(self) -> Figure:
        """The first Fréchet distance."""
        return next(figure for figure in self.figures if is_distance(figure))

    def write(self, path: Path) -> None:
        figures = [figure.to_json() for figure in self.figures]
        values = {"run": self.run, "options": self.options, "about": self.about, "figures": figures}
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Point:
        """Raises DataError for a file that is none of `write`'s."""
        try:
            values = json.loads(path.read_text())
            figures = [Figure(**figure) for figure in values["figures"]]
            return cls(values["run"], values["options"], values["about"], figures)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} is no point of a sweep ({error}); remove it, and it is measured again."
            ) from error


def as_csv(points: Sequence[Point]) -> str:
    """A row for each point: run, options, each figure with the ends of its interval."""
    keys = dict.fromkeys(key for point in points for key in point.options)
    names = dict.fromkeys(figure.name for point in points for figure in point.figures)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    ends = [column for name in names for column in (name, f"{name} low", f"{name} high")]
    rows.writerow(["run", *keys, "pictures", *ends, "text_encoder_parameters", "seconds_per_picture"])
    for point in points:
        cells: list[object] = [
            point.run,
            *(point.options.get(key, "") for key in keys),
            point.figures[0].count,
        ]
        for name in names:
            figure = point.named(name)
            low, high = (figure and figure.interval_95) or ("", "")
            cells += ["" if figure is None else figure.value, low, high]
        about = point.about
        rows.writerow([*cells, about.get("text_encoder_parameters"), about.get("seconds_per_picture")])
    return text.getvalue()


def series(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The lines of a plot: of each run, and of each choice of all options but the first, which runs along the line."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        others = [f"{key}={value}" for key, value in list(point.options.items())[1:]]
        lines.setdefault(" ".join([point.run, *others]), []).append(point)
    return lines


def draw_curve(points: Sequence[Point], path: Path) -> None:
    """Distance over CLIP score, or where there is none over the first option, a line for each of `series`."""
    from matplotlib.figure import Figure as Canvas

    first = next(iter(points[0].options), "")
    by_clip = all(point.named("CLIP score") for point in points)
    canvas = Canvas(figsize=(8, 5), layout="constrained")
    axes = canvas.subplots()
    for name, line in series(points).items():
        values = [point.options.get(first, "") for point in line]
        across: list[Any] = [point.named("CLIP score").value for point in line] if by_clip else values  # type: ignore[union-attr]
        if not by_clip and all(map(_is_number, values)):
            across = [float(value) for value in values]
        heights = [point.distance.value for point in line]
        axes.errorbar(across, heights, intervals(line), marker="o", capsize=3, elinewidth=0.8, label=name)
        for x, y, value in zip(across, heights, values, strict=True):
            axes.annotate(value, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xlabel(f"CLIP score, at each point {first}" if by_clip else first)
    axes.set_ylabel(said_of(points[0].distance))
    axes.legend(fontsize=8)
    with written_whole(path) as unfinished:
        canvas.savefig(unfinished, format="png", dpi=110)


def intervals(points: Sequence[Point]) -> list[list[float]]:
    """How far the interval of each one's distance goes below it and above it: two rows, as matplotlib takes them."""
    found = [
        (point.distance.value, *(point.distance.interval_95 or [point.distance.value] * 2))
        for point in points
    ]
    return [[value - low for value, low, _ in found], [high - value for value, _, high in found]]


def said_of(distance: Figure) -> str:
    """What stands at the axis of a distance."""
    interval = "" if distance.interval_95 is None else ", 95% interval"
    return f"{distance.name}, {plural(distance.count, 'picture')}{interval}"


def encoders(points: Sequence[Point]) -> dict[str, tuple[int, Point]]:
    """Of each text encoder the number of its parameters and its best point; {} where there is one encoder in all."""
    best: dict[str, tuple[int, Point]] = {}
    for point in points:
        name, size = point.about.get("text_encoder"), point.about.get("text_encoder_parameters")
        if name is None or size is None:
            continue
        if name not in best or point.distance.value < best[name][1].distance.value:
            best[name] = (size, point)
    return best if len(best) > 1 else {}


def draw_encoders(best: dict[str, tuple[int, Point]], path: Path) -> None:
    """The lowest distance over the parameters of the frozen text encoder (Imagen, 2205.11487, figure 4a)."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 5), layout="constrained")
    axes = canvas.subplots()
    ordered = sorted(best.items(), key=lambda item: item[1][0])
    sizes, chosen = [size for _, (size, _) in ordered], [point for _, (_, point) in ordered]
    heights = [point.distance.value for point in chosen]
    axes.errorbar(sizes, heights, intervals(chosen), marker="o", capsize=3, elinewidth=0.8)
    for (name, _), x, y in zip(ordered, sizes, heights, strict=True):
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("parameters of the text encoder")
    axes.set_ylabel(f"lowest {said_of(chosen[0].distance)}")
    with written_whole(path) as unfinished:
        canvas.savefig(unfinished, format="png", dpi=110)


def write_curves(points: Sequence[Point], folder: Path) -> list[Path]:
    """sweep.csv, sweep.png, and where the runs' text encoders differ encoders.png."""
    with written_whole(folder / "sweep.csv") as unfinished:
        unfinished.write_text(as_csv(points))
    draw_curve(points, folder / "sweep.png")
    written = [folder / "sweep.csv", folder / "sweep.png"]
    if best := encoders(points):
        draw_encoders(best, folder / "encoders.png")
        written.append(folder / "encoders.png")
    return written


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
