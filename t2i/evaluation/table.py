"""Runs side by side, as rows of text, Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2i.evaluation.measure import Figure
from t2i.evaluation.published import PUBLISHED
from t2i.files import written_whole

ABOUT = ("model", "type", "parameters", "training images")
COST = ("s / picture", "GiB", "pictures", "source")
SHOWN = ("exact", "CLIP score")  # beside the distances


def comparison_rows(
    measured: Sequence[tuple[dict[str, Any], Sequence[Figure]]], published: bool
) -> list[list[str]]:
    """The header and a row for each run; then, in a column of their own, what others published.

    measured: of each run what it is and what it took, and its figures
    """
    names = shown(measured)
    rows = [[*ABOUT, *names, *(["FID as published"] if published else []), *COST]]
    for about, figures in measured:
        by_name = {figure.name: figure for figure in figures}
        rows.append(
            [
                about["run"],
                f"{about['type']}, {about['size_px']} px",
                f"{about['parameters']:,}",
                _number(about["training_images"], ","),
                *(with_interval(by_name.get(name)) for name in names),
                *(["-"] if published else []),
                _number(about["seconds_per_picture"], ".3g"),
                _number(about["memory_gib"], ".2f"),
                f"{figures[0].count:,}",
                "measured here",
            ]
        )
    for each in PUBLISHED if published else ():
        rows.append(
            [
                each.model,
                each.type,
                _number(each.parameters, ",.0f"),
                _number(each.images, ",.0f"),
                *("-" for _ in names),
                f"{each.fid:g} ({each.data})",
                _number(each.seconds, "g"),
                *("-", "-"),
                f"published, {each.source}",
            ]
        )
    return rows


def shown(measured: Sequence[tuple[dict[str, Any], Sequence[Figure]]]) -> list[str]:
    """The figures that have a column: distances first."""
    distances = list(dict.fromkeys(f.name for _, figures in measured for f in figures if is_distance(f)))
    return distances + [
        name for name in SHOWN if any(f.name == name for _, figures in measured for f in figures)
    ]


def notes(measured: Sequence[tuple[dict[str, Any], Sequence[Figure]]]) -> list[str]:
    """What the columns are over, and that sizes differ where they do."""
    over = {
        f.name: f.features for _, figures in measured for f in figures if is_distance(f) or f.name in SHOWN
    }
    said = [f"{name}: {features}." for name, features in over.items()]
    if len({about["size_px"] for about, _ in measured}) > 1:
        said.append("These runs draw in several sizes; the reference was cut to each, which moves distances.")
    return said


def is_distance(figure: Figure) -> bool:
    """A Fréchet distance."""
    return figure.name.startswith(("FID", "FD"))


def with_interval(figure: Figure | None) -> str:
    """The value, and half of its interval after ±; the ends of one that lies more to one side, as that of a share near
    0 or 1 does."""
    if figure is None:
        return "-"
    if figure.interval_95 is None:
        return f"{figure.value:.4g}"
    low, high = figure.interval_95
    if abs(low + high - 2 * figure.value) > 0.1 * (high - low):
        return f"{figure.value:.4g} ({low:.2g} to {high:.2g})"
    return f"{figure.value:.4g} ± {(high - low) / 2:.2g}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_csv(measured: Sequence[tuple[dict[str, Any], Sequence[Figure]]], published: bool) -> str:
    """`comparison_rows` as numbers, each figure with the ends of its interval; what is not known is empty."""
    names, text = shown(measured), io.StringIO()
    ends = [column for name in names for column in (name, f"{name} low", f"{name} high")]
    about = ("run", "type", "size_px", "parameters", "training_images")
    cost = ("seconds_per_picture", "memory_gib", "pictures")
    rows = csv.DictWriter(
        text, [*about, *ends, "FID as published", "of", *cost, "source"], lineterminator="\n"
    )
    rows.writeheader()
    for run, figures in measured:
        row = {key: run[key] for key in (*about, *cost[:2])} | {"source": "measured here"}
        row["pictures"] = figures[0].count
        for figure in figures:
            if figure.name in names:
                low, high = figure.interval_95 or (None, None)
                row |= {figure.name: figure.value, f"{figure.name} low": low, f"{figure.name} high": high}
        rows.writerow(row)
    for each in PUBLISHED if published else ():
        row = {"run": each.model, "type": each.type, "parameters": each.parameters}
        row |= {"training_images": each.images, "FID as published": each.fid, "of": each.data}
        row |= {"seconds_per_picture": each.seconds, "source": f"published, {each.source}"}
        rows.writerow(row)
    return text.getvalue()


def draw_table(rows: Sequence[Sequence[str]], path: Path) -> None:
    """As PNG."""
    from matplotlib.figure import Figure as Canvas

    lengths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    canvas = Canvas(figsize=(0.085 * sum(lengths) + 1, 0.3 * len(rows) + 0.5), layout="constrained")
    axes = canvas.subplots()
    axes.axis("off")
    widths = [length / sum(lengths) for length in lengths]
    cells, header = [list(row) for row in rows[1:]], list(rows[0])
    drawn = axes.table(cells, colLabels=header, colWidths=widths, loc="center", cellLoc="left")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    with written_whole(path) as unfinished:
        canvas.savefig(unfinished, format="png", dpi=110, bbox_inches="tight")


def write_tables(
    rows: Sequence[Sequence[str]], said: Sequence[str], numbers: str, folder: Path
) -> list[Path]:
    """compare.md, with what is `said` below, compare.csv, of the `numbers` that `as_csv` gives, and compare.png."""
    below = "".join(f"\n{line}\n" for line in said)
    texts = {"compare.md": markdown(rows) + below, "compare.csv": numbers}
    for name, text in texts.items():
        with written_whole(folder / name) as unfinished:
            unfinished.write_text(text)
    draw_table(rows, folder / "compare.png")
    return [folder / name for name in (*texts, "compare.png")]
