"""The demo's report: what the newest runs learned from, what they draw, how often that is what was asked."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.config import DataConfig, parse
from t2i.data.reader import read_all
from t2i.errors import DataError
from t2i.evaluation.background import white_deviation
from t2i.evaluation.page import Page
from t2i.evaluation.prompts import Judge, PromptScore, group_of, judge_for, score
from t2i.interfaces import Batch
from t2i.training.pictures import grid
from t2i.training.run_folder import read_config, read_summary

NUM_SHOWN = 40


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and resolved configuration."""

    folder: Path
    config: dict[str, Any]
    name: str  # in the report: the resolution, and the folder where several runs have the same

    @classmethod
    def read_all(cls, folders: list[Path]) -> list[Run]:
        configs = [read_config(folder) for folder in folders]
        sizes = [config["resolution"]["size_px"] for config in configs]
        return [
            cls(folder, config, f"{size}-{folder.name}" if sizes.count(size) > 1 else str(size))
            for folder, config, size in zip(folders, configs, sizes, strict=True)
        ]

    @property
    def size_px(self) -> int:
        return self.config["resolution"]["size_px"]

    @property
    def label(self) -> str:
        """The run in the report's figures, such as "ldm-64"."""
        return f"{self.config['stage']}-{self.name}"

    def heldout(self, size_px: int) -> Batch:
        return self._read("heldout_shards", size_px)

    def train(self, size_px: int, limit: int | None = None) -> Batch:
        return self._read("shards", size_px, limit)

    def _read(self, key: str, size_px: int, limit: int | None = None) -> Batch:
        data = parse(DataConfig, self.config["data"], "data.")
        shards = getattr(data, key)
        if not shards:
            raise DataError(f"{self.folder} was trained without data.{key}; a report needs them.")
        return read_all(data, shards, size_px, limit)


def write_report(
    folder: Path,
    autoencoder: Path,
    generators: list[Path],
    reconstruct: Callable[[Path, Tensor], Tensor],
    draw: Callable[[Path, list[str]], Tensor],
) -> Path:
    """Writes report.html, report.json and their PNGs into `folder`.

    autoencoder, generators: run folders; the generators' in the order in which they were trained
    reconstruct: (run, pictures (N, 3, H, W) in [-1, 1]) -> the same through the codec
    draw: (run, N prompts) -> (N, 3, H, W) in [-1, 1] at the run's own resolution
    """
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    page = Page(folder, "t2i: from captioned shards to pictures")
    (codec_run,), runs = Run.read_all([autoencoder]), Run.read_all(generators)
    figures: dict[str, Any] = {"seconds": {}}
    for run in (codec_run, *runs):
        if summary := read_summary(run.folder):  # a run that was killed has none
            figures["seconds"][run.label] = summary["seconds"]

    page.heading("The data")
    shown = codec_run.train(codec_run.size_px, limit=NUM_SHOWN)
    page.picture(
        "data",
        grid(shown.image, 8),
        "Training pictures, with captions such as: " + "; ".join(shown.caption[:3]),
        2,
    )

    page.heading("The autoencoder")
    heldout = codec_run.heldout(codec_run.size_px)
    decoded = reconstruct(autoencoder, heldout.image)
    figures["psnr_db"] = round(psnr_db(heldout.image, decoded), 2)
    page.paragraph(f"Pictures that no stage was trained on come back with {figures['psnr_db']} dB PSNR.")
    rows = [
        row for pair in zip(heldout.image[:16].split(8), decoded[:16].split(8), strict=True) for row in pair
    ]
    page.picture(
        "reconstructions", grid(torch.cat(rows), 8), "Held-out pictures, each row above its reconstruction", 2
    )

    for run in runs:
        page.heading(f"Latent diffusion at {run.size_px} px")
        unseen = run.heldout(run.size_px)
        judge = judge_for(partial(run.train, run.size_px), unseen)
        images = draw(run.folder, unseen.caption if judge else unseen.caption[:NUM_SHOWN])
        if judge is not None:
            say_scores(page, figures, run, score_groups(judge, images, unseen))
        deviation = white_deviation(images, unseen.image[: len(images)])
        if deviation is not None:
            figures.setdefault("white_background_deviation", {})[run.label] = round(deviation, 2)
            page.paragraph(
                f"Where the real picture's background is white, these are {deviation:.1f} of 255 levels darker."
            )
        asked = "; ".join(unseen.caption[:NUM_SHOWN])
        page.picture(
            f"samples_{run.name}",
            grid(images[:NUM_SHOWN], 8),
            f"Drawn for prompts never seen in training, row by row: {asked}",
            enlarge=max(1, 128 // run.size_px),
        )
    page.heading("Losses")
    for run in (codec_run, *runs):
        draw_losses = partial(plot_losses, folder=run.folder)
        page.plot(f"loss_{run.label}", f"{run.label}: {run.folder}", draw_losses)

    page.heading("Times")
    figures["seconds"]["report"] = round(time.perf_counter() - began, 1)
    page.table([(name, f"{seconds:.0f} s") for name, seconds in figures["seconds"].items()])
    page.heading("To go on")
    page.commands(
        [
            't2i sample --prompt "a woman astronaut with dark skin"',
            "t2i train stage=ldm resolution=128",
            "t2i train stage=autoencoder data=shards data.shards='path/to/{00000..00004}.tar'",
        ]
    )
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    return page.write("report.html")


def psnr_db(image: Tensor, decoded: Tensor) -> float:
    """Mean over pictures of 10 log10(peak^2 / MSE), for (N, 3, H, W) in [-1, 1] (peak 2), clamped there."""
    mse = (image - decoded.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((10 * torch.log10(4 / mse)).mean())


def plot_losses(axes: Any, folder: Path) -> None:
    """The loss, and what it is made of, over images seen."""
    path, rows = folder / "metrics.csv", []
    if path.is_file():  # absent where a run ended before its first log
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    for name in ("loss", "l1", "perceptual", "generator", "discriminator"):
        points = [(int(row["images"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    axes.set_xlabel("images seen")
    if axes.lines:
        axes.set_yscale("symlog", linthresh=0.01)  # the generator's term may be negative
        axes.legend()


def score_groups(judge: Judge, images: Tensor, unseen: Batch) -> dict[str, tuple[PromptScore, PromptScore]]:
    """By group of prompts: the score of the drawn pictures, and that of the real held-out ones, its bound."""
    drawn, real = judge(images, unseen.metadata), judge(unseen.image, unseen.metadata)
    groups = [group_of(sample) for sample in unseen.metadata]
    return {
        name: (
            score([answer for answer, group in zip(drawn, groups, strict=True) if group == name]),
            score([answer for answer, group in zip(real, groups, strict=True) if group == name]),
        )
        for name in dict.fromkeys(groups)
    }


def say_scores(
    page: Page, figures: dict[str, Any], run: Run, scores: dict[str, tuple[PromptScore, PromptScore]]
) -> None:
    """Writes the scores of one run as text and table, and as figures (those of the last run stay on top)."""
    for name, (drawn, real) in scores.items():
        figures[f"{name}_exact"] = drawn.exact
        figures[f"{name}_by_attribute"] = drawn.by_attribute
        figures.setdefault(f"{name}_exact_by_run", {})[run.label] = drawn.exact
        page.paragraph(
            f"{name.replace('_', ' ').capitalize()}: of {drawn.count} prompts never seen in training, "
            f"{drawn.exact:.1%} of the pictures show exactly what was asked "
            f"(the real pictures: {real.exact:.1%})."
        )
        page.table(
            [
                (key, f"{share:.1%}", f"{real.by_attribute[key]:.1%}")
                for key, share in drawn.by_attribute.items()
            ],
            header=("attribute", "drawn", "real pictures"),
        )
