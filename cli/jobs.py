"""`t2i jobs`: the runs that were submitted from here, and how far they are."""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

from t2i.errors import UserError

from .submit import JOB


def run(arguments: list[str]) -> None:
    """A table of the runs with a job; `t2i jobs cancel RUN ...` cancels theirs."""
    parser = argparse.ArgumentParser(
        prog="t2i jobs", description="Runs with a job, their states, images and last checkpoint."
    )
    parser.add_argument("--runs-dir", default="runs", metavar="DIR")
    verbs = parser.add_subparsers(dest="verb")
    cancel = verbs.add_parser("cancel", help="cancel the jobs of runs")
    cancel.add_argument("run", nargs="+", help="a run folder")
    options = parser.parse_args(arguments)
    from t2i.launch import queue

    from .console import console

    if options.verb == "cancel":
        for run in options.run:
            job = _job(Path(run))
            if job is None:
                raise UserError(f"{run} has no job ({JOB}); allowed: run folders that launch=slurm made.")
            queue.cancel(job["job"])
            console.print(f"Job {job['job']} of {run} is cancelled.")
        return
    folders = sorted(
        path.parent for path in Path(options.runs_dir).glob(f"*/*/{JOB}") if not path.parent.is_symlink()
    )
    jobs = {folder: job for folder in folders if (job := _job(folder)) is not None}
    if not jobs:
        console.print(f"No run in {options.runs_dir} has a job: `t2i train ... launch=slurm` submits one.")
        return
    states = queue.states(job["job"] for job in jobs.values())
    rows = [("run", "job", "state", "images", "images/s", "loss", "last checkpoint")]
    for folder, job in jobs.items():
        last = _last_row(folder / "metrics.csv")
        rows.append(
            (
                str(folder.relative_to(options.runs_dir)),
                job["job"],
                states.get(job["job"]) or _outcome(folder),
                _number(last, "images", ",.0f"),
                _number(last, "images_per_second", ",.1f"),
                _number(last, "loss", ".4f"),
                _last_checkpoint(folder),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        console.print("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


def _job(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / JOB).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("job"), str) else None


def _outcome(folder: Path) -> str:
    """Of a job that SLURM has forgotten."""
    return "complete" if (folder / "model.safetensors").is_file() else "ended, not complete"


def _last_row(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        return {}
    return rows[-1] if rows else {}


def _number(row: dict[str, str], name: str, form: str) -> str:
    try:
        return format(float(row.get(name) or ""), form)
    except ValueError:
        return "-"


def _last_checkpoint(folder: Path) -> str:
    saved = list((folder / "checkpoints").glob("step_*"))
    if not saved:
        return "-"
    newest = max(saved, key=lambda path: path.stat().st_mtime)
    minutes = (time.time() - newest.stat().st_mtime) / 60
    return f"{newest.stem}, {minutes:.0f} min ago"
