"""`t2i evaluate [JOB] ...`: finds the job's file and calls it."""

from __future__ import annotations

import importlib

JOBS = ("compare", "sweep")


def run(arguments: list[str]) -> None:
    """Calls the job that the first argument names, or else measures the pictures or the run that it names."""
    if arguments and arguments[0] in JOBS:
        importlib.import_module(f"t2i_cli.evaluate.{arguments[0]}").run(arguments[1:])
    else:
        importlib.import_module("t2i_cli.evaluate.measure").run(arguments)
