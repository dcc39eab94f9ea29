"""`t2i jobs`: the runs that were submitted from here, and how far they are."""

from __future__ import annotations

import argparse
import csv
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from t2i.errors import UserError
from t2i.few import first_few

from .arguments import Parser
from .submit import JOB

LONGEST_ROW = 2**16  # bytes, in metrics.csv


def run(arguments: list[str]) -> None:
    """A table of the runs with a job; `t2i jobs cancel RUN ...` cancels theirs."""
    options = parser().parse_args(arguments)
    from t2i.launch import queue

    from .console import console

    if options.verb == "cancel":
        _cancel(options.run)
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


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="t2i jobs", description="Runs with a job, their states, images and last checkpoint.")
    made.add_argument("--runs-dir", default="runs", metavar="DIR", help="where the runs are")
    verbs = made.add_subparsers(dest="verb")
    cancel = verbs.add_parser("cancel", help="cancel the jobs of runs")
    cancel.add_argument("run", nargs="+", help="a run folder")
    return made


def _cancel(runs: list[str]) -> None:
    """Raises UserError for one that has no job, so that none is cancelled, or where SLURM refuses."""
    from t2i.launch import queue

    from .console import console

    asked = {run: _job(Path(run)) for run in runs}
    if without := [run for run, job in asked.items() if job is None]:
        raise UserError(
            f"{', '.join(first_few(without))} has no job ({JOB}), so that none is cancelled; allowed: run folders "
            "that launch=slurm made."
        )
    jobs = {run: job["job"] for run, job in asked.items() if job is not None}
    states, failed = queue.states(jobs.values()), list[str]()
    for run, job in jobs.items():
        if queue.has_ended(state := states.get(job, "")):
            console.print(f"Job {job} of {run} has ended before: {state}.")
            continue
        try:
            queue.cancel(job)
            console.print(f"Job {job} of {run} is cancelled.")
        except UserError as error:
            failed.append(f"job {job} of {run}: {error}")
    if failed:
        raise UserError("; ".join(first_few(failed)))


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
    """Empty where there is none, or it cannot be read. A file of weeks has millions of rows, of which the first and the
    last are read."""
    try:
        with path.open("rb") as file:
            head = file.readline()
            file.seek(max(file.tell(), file.seek(0, 2) - LONGEST_ROW))
            rows = [row for row in file.read().splitlines() if row]
        text = [line.decode(errors="replace") for line in (head, *rows[-1:])]
        return next(csv.DictReader(text), {})
    except (OSError, csv.Error):
        return {}


def _number(row: dict[str, str], name: str, form: str) -> str:
    try:
        return format(float(row.get(name) or ""), form)
    except ValueError:
        return "-"


def _last_checkpoint(folder: Path) -> str:
    found = dict[float, Path]()
    for path in (folder / "checkpoints").glob("step_*"):
        with suppress(OSError):  # the run may remove it now
            found[path.stat().st_mtime] = path
    if not found:
        return "-"
    written_s, newest = max(found.items())
    minutes = (time.time() - written_s) / 60
    return f"{newest.stem}, {minutes:.0f} min ago"
