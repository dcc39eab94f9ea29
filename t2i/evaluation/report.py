"""The demo's report: what the newest runs were trained on, what they draw, and how often that is what was asked."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.config import DataConfig, parse
from t2i.data.reader import read_all
from t2i.evaluation.page import Page
from t2i.evaluation.prompts import Judge, PromptResult, follow_prompts, judge_for
from t2i.interfaces import Batch
from t2i.training.pictures import grid
from t2i.training.run_folder import read_config, read_summary

NUM_JUDGED = 256  # held-out captions drawn, at most
NUM_SHOWN = 40


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and resolved configuration."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        return cls(folder, read_config(folder))

    @property
    def size_px(self) -> int:
        return self.config["resolution"]["size_px"]

    @property
    def label(self) -> str:
        """The name of the run's stage in the report, such as "ldm-64"."""
        return f"{self.config['stage']}-{self.size_px}"

    def heldout(self, size_px: int) -> Batch:
        return self._read("heldout_shards", size_px)

    def train(self, size_px: int, limit: int | None = None) -> Batch:
        return self._read("shards", size_px, limit)

    def _read(self, key: str, size_px: int, limit: int | None = None) -> Batch:
        data = parse(DataConfig, self.config["data"], "data.")
        return read_all(data, getattr(data, key), size_px, limit)


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
    codec_run, runs = Run.read(autoencoder), [Run.read(path) for path in generators]
    figures: dict[str, Any] = {"seconds": {run.label: read_summary(run.folder)["seconds"] for run in (codec_run, *runs)}}

    page.heading("The data")
    shown = codec_run.train(codec_run.size_px, limit=NUM_SHOWN)
    page.picture("data", grid(shown.image, 8), "Training pictures, with captions such as: " + "; ".join(shown.caption[:3]), 2)

    page.heading("The autoencoder")
    heldout = codec_run.heldout(codec_run.size_px)
    decoded = reconstruct(autoencoder, heldout.image)
    figures["psnr_db"] = round(psnr_db(heldout.image, decoded), 2)
    page.paragraph(f"Pictures that no stage was trained on come back with {figures['psnr_db']} dB PSNR.")
    rows = [row for pair in zip(heldout.image[:16].split(8), decoded[:16].split(8), strict=True) for row in pair]
    page.picture("reconstructions", grid(torch.cat(rows), 8), "Held-out pictures, each row above its reconstruction", 2)

    for run in runs:
        page.heading(f"Latent diffusion at {run.size_px} px")
        seen, unseen = run.train(run.size_px), _first(run.heldout(run.size_px), NUM_JUDGED)
        judge = judge_for(seen, unseen)
        if judge is None:
            images = draw(run.folder, unseen.caption[:NUM_SHOWN])
        else:
            result = follow_prompts(lambda prompts, run=run: draw(run.folder, prompts), unseen, judge)
            images = result.images
            figures["unseen_exact"] = result.result.exact
            figures["unseen_by_attribute"] = result.result.by_attribute
            figures.setdefault("unseen_exact_by_run", {})[run.label] = result.result.exact
            _say_result(page, result, len(unseen))
        scale = max(1, 128 // run.size_px)
        page.picture(
            f"samples_{run.size_px}", grid(images[:NUM_SHOWN], 8), "Drawn for prompts never seen in training, in order: "
            + "; ".join(unseen.caption[:NUM_SHOWN]), scale)
    page.heading("Losses")
    for run in (codec_run, *runs):
        page.plot(f"loss_{run.label}", f"{run.label}: {run.folder}", lambda axes, run=run: plot_losses(axes, run.folder))

    page.heading("Times")
    figures["seconds"]["report"] = round(time.perf_counter() - began, 1)
    page.table([(name, f"{seconds:.0f} s") for name, seconds in figures["seconds"].items()])
    page.heading("To go on")
    page.commands([
        't2i sample --prompt "a woman astronaut with dark skin"',
        "t2i train stage=ldm resolution=128",
        "t2i train stage=autoencoder data=shards data.shards='path/to/{00000..00004}.tar'",
    ])
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    return page.write("report.html")


def psnr_db(image: Tensor, decoded: Tensor) -> float:
    """Mean over pictures of 10 log10(peak^2 / MSE), for (N, 3, H, W) in [-1, 1] (peak 2), clamped there."""
    mse = (image - decoded.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((10 * torch.log10(4 / mse)).mean())


def plot_losses(axes: Any, folder: Path) -> None:
    """The loss, and what it is made of, over images seen."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "l1", "perceptual", "generator", "discriminator"):
        points = [(int(row["images"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    axes.set_xlabel("images seen")
    axes.legend()


def _say_result(page: Page, result: PromptResult, count: int) -> None:
    drawn, real = result.result, result.real
    page.paragraph(
        f"Of {count} prompts never seen in training, {drawn.exact:.1%} of the pictures show exactly what was asked "
        f"(the real pictures themselves: {real.exact:.1%})."
    )
    page.table(
        [(name, f"{share:.1%}", f"{real.by_attribute[name]:.1%}") for name, share in drawn.by_attribute.items()],
        header=("attribute", "drawn", "real pictures"),
    )


def _first(batch: Batch, count: int) -> Batch:
    return Batch(
        image=batch.image[:count],
        caption=batch.caption[:count],
        key=batch.key[:count],
        original_size=batch.original_size[:count],
        crop=batch.crop[:count],
        metadata=batch.metadata[:count],
    )
