"""The run that a verb takes where no --checkpoint is given."""

from __future__ import annotations

from pathlib import Path

from t2i.errors import UserError


def newest_that_draws(runs_dir: str) -> Path:
    """The newest run for prompts, of whatever stage. Says which newer ones did not come to their end."""
    from t2i import families
    from t2i.training import run_folder

    from .console import console

    stages = families.stages_with("generator")
    newest, passed_over = run_folder.newest_finished(runs_dir, stages)
    if newest is None:
        folders = ", ".join(f"{runs_dir}/{stage}" for stage in stages)
        raise UserError(f"There is no trained run in {folders}: train one, or name one by --checkpoint.")
    for run in passed_over:
        console.print(f"Passed over {run}, which did not come to its end: --checkpoint {run} takes it.")
    return newest
