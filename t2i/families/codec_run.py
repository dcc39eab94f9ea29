"""The run whose codec a stage builds on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from t2i import families
from t2i.config import RunConfig
from t2i.errors import CheckpointError
from t2i.families.tokens import has_tokens
from t2i.training import run_folder
from t2i.training.checkpoint import LoadedCheckpoint, load

log = logging.getLogger(__name__)


def codec_run(config: RunConfig, place: str, start: LoadedCheckpoint | None) -> tuple[LoadedCheckpoint, str]:
    """The checkpoint that builds_on.codec of `config` means, and its place. Raises CheckpointError.

    place: what builds_on.codec says; start: what the run continues, whose codec "latest" then means
    """
    if place == "latest" and start is not None:
        found = families.get(start.config["family"]).load_config().upgraded(start.config)
        return start, found["builds_on"]["codec"]
    if place == "latest":
        part = families.get(config.family).builds_on["codec"]
        stages = families.stages_with(part)
        newest, passed_over = newest_codec(config.runs_dir, part)
        for run in passed_over:
            log.info("passes over %s, which did not come to its end", run)
        if newest is None:
            folders = " and ".join(f"{config.runs_dir}/{stage}" for stage in stages)
            kind, option = ("a codec of codes", " codec=vq") if part == "token_codec" else ("a codec", "")
            raise CheckpointError(
                f"stage={config.stage} builds on {kind}, and there is none in {folders}: train one with "
                f"`t2i train stage={stages[0]}{option}`, or give builds_on.codec=RUN or FILE."
            )
        place = str(newest)
    log.info("builds on the codec %s", place)
    return load(run_folder.weights_file(place)), place


def codec_config(found: LoadedCheckpoint) -> dict[str, Any]:
    """The top-level mapping of the configuration of the codec that a checkpoint is or holds."""
    return found.extra.get("codec", found.config)


def newest_codec(runs_dir: str, part: str) -> tuple[Path | None, list[Path]]:
    """As `run_folder.newest_finished`, of the runs that have a "codec" or a "token_codec"."""
    fits = _gives_tokens if part == "token_codec" else lambda folder: True
    return run_folder.newest_finished(runs_dir, families.stages_with(part), fits)


def _gives_tokens(folder: Path) -> bool:
    try:
        return has_tokens(run_folder.read_config(folder))
    except CheckpointError:
        return False
