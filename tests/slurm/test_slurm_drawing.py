"""What draws and measures as jobs of SLURM: interrupted or not, all is there once, and as one process makes it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lab import Slurm
from PIL import Image
from safetensors.torch import save_file

from t2i.config import parse_run
from t2i.families.pixel_diffusion.config import Config
from t2i.families.pixel_diffusion.model import PixelDiffusion
from t2i_cli.composition import composed_run

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LAUNCH = ("cluster=lab", "launch=slurm", "--config-dir", "conf")
PROMPTS = 16
DRAW = ("sample", "--prompts-file", "p.jsonl", "--num-images", "1", "--batch-size", "1", "--steps", "25")
SWEEP = ("evaluate", "sweep", "w.safetensors", "steps=1,2", "--prompts", "p.jsonl", "--reference", "real")
FAULT = """
from t2i_cli import sample_bar
shown = sample_bar.Bar.picture
def goes_wrong(self, path):
    shown(self, path)
    if self._named == 2 and "process 1 of 2" in self._bar.tasks[0].description:
        raise ZeroDivisionError("a fault of the code")
sample_bar.Bar.picture = goes_wrong
from t2i_cli.main import main
main()
"""


@pytest.fixture(scope="module", autouse=True)
def files(slurm: Slurm) -> None:
    """Weights that draw, prompts, and real pictures, where `t2i` is called."""
    config = composed_run(["experiment=pixel_diffusion/tiny_cosine_learned"])
    torch.manual_seed(0)
    model = PixelDiffusion(parse_run(config, Config).model, 32)  # type: ignore[arg-type]
    weights = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, slurm.folder / "w.safetensors", {"t2i": json.dumps({"config": config, "extra": {}})})
    lines = [json.dumps({"prompt": f"{i} red circles", "seed": i}) for i in range(PROMPTS)]
    (slurm.folder / "p.jsonl").write_text("\n".join(lines))
    (slurm.folder / "real").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (i, 8 * i, 20)).save(slurm.folder / "real" / f"{i}.png")


def submitted(slurm: Slurm, *arguments: str) -> str:
    """The job's number."""
    return slurm.t2i(*arguments, *LAUNCH).split()[1].rstrip(":")


@pytest.fixture(scope="module")
def sweep(slurm: Slurm, files: None) -> str:
    """A job that measures while others draw."""
    return submitted(slurm, *SWEEP, "--force", "--rounds", "0", "--out", "swept")


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_an_interrupted_job_draws_what_one_process_does(slurm, sweep):
    job = submitted(slurm, *DRAW, "--checkpoint", "w.safetensors", "--out", "drawn")
    drawn = slurm.folder / "drawn"
    slurm.until(lambda: {"n": str(len(pngs(drawn)))}, lambda found: int(found["n"]) >= 3, job)
    subprocess.run(["scontrol", "requeue", f"{job}_0"], check=True)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{job}_1"], check=True)  # its time is nearly over
    requeued = "to be started again"
    slurm.until(lambda: {"log": slurm.log(job)}, lambda found: requeued in found["log"], job)
    before = {path: path.stat().st_mtime_ns for path in drawn.glob("*.png")}
    assert len(before) < PROMPTS, "it was over too soon"
    for part in ("0", "1"):
        ended = slurm.wait(f"{job}_{part}")
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    log = slurm.log(job)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items()), log
    assert log.count(f"All {PROMPTS} pictures are listed in drawn/manifest.jsonl.") == 1, log
    slurm.t2i(*DRAW, "--checkpoint", "w.safetensors", "--out", "alone")
    assert len(pngs(drawn)) == PROMPTS + 1  # and the grid
    assert pngs(drawn) == pngs(slurm.folder / "alone")
    together, alone = ((slurm.folder / each / "manifest.jsonl").read_text() for each in ("drawn", "alone"))
    assert together == alone
    shown = {path.name for path in drawn.iterdir() if not path.name.startswith(".")}
    assert shown == {*pngs(drawn), "manifest.jsonl"}


def test_a_sweep_is_measured_by_all_nodes(slurm, sweep):
    for part in ("0", "1"):
        assert slurm.wait(f"{sweep}_{part}")["JobState"] == "COMPLETED", slurm.log(sweep)
    log = slurm.log(sweep)
    assert log.count("1 of 1 (process 0 of 2): w.safetensors steps=1: FD") == 1, log
    assert log.count("1 of 1 (process 1 of 2): w.safetensors steps=2: FD") == 1, log
    rows = list(csv.DictReader((slurm.folder / "swept" / "sweep.csv").open()))
    assert [(row["steps"], row["pictures"]) for row in rows] == [("1", f"{PROMPTS}"), ("2", f"{PROMPTS}")]


def test_a_fault_in_one_process_ends_the_job_and_keeps_what_is_drawn(slurm):
    (slurm.folder / "fault_drawing.py").write_text(FAULT)
    wrap = slurm.folder / "wrap_drawing.sh"  # in the place of python -m t2i_cli.main
    wrap.write_text(f'#!/bin/bash\nshift 3\nexec {sys.executable} {slurm.folder}/fault_drawing.py "$@"\n')
    wrap.chmod(0o755)
    two = ("cluster.nodes=1", "cluster.gpus_per_node=2", f"cluster.slurm.run_in={wrap}")
    job = submitted(slurm, *DRAW, "--checkpoint", "w.safetensors", "--out", "broken", *two)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), slurm.log(job)
    log = slurm.log(job)
    assert log.count("Traceback (most recent call last):") == 1, log
    assert "ZeroDivisionError: a fault of the code" in log
    assert 2 <= len(pngs(slurm.folder / "broken")) < PROMPTS
