"""The run that a command goes on with, and whether it says what that run was begun with."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from t2i.config import RunConfig, parse_run, run_to_dict
from t2i.data.sources import is_local
from t2i.errors import CheckpointError, ConfigError
from t2i.few import plural
from t2i.training import run_folder
from t2i.training.checkpoint import load
from t2i.training.state_folder import check_whole

HOW_DATA_IS_READ = (
    "heldout_shards",
    "num_workers",
    "cache_mib",
    "shard_cache_gib",
    "deadline_s",
    "max_bad_share",
)

log = logging.getLogger(__name__)


def resumed_run(config: RunConfig) -> Path | None:
    """The run folder that config.resume means; None for a new run. Raises CheckpointError where there is none, or the
    command says other than the run's own did."""
    found = run_folder.resumed(config.runs_dir, config.stage, config.name, config.resume)
    if found is not None:
        _check_same_run(config, found)
        set_damaged_aside(found)
    return found


def set_damaged_aside(folder: Path) -> None:
    """Renames checkpoints that cannot be read, from the newest on, so that the newest good one is gone on from. Raises
    CheckpointError where there is none: all stay as they are then, and no later start takes the run for a new one."""
    damaged = list[tuple[Path, CheckpointError]]()
    for path in reversed(run_folder.written(folder)):
        try:
            check_whole(path) if path.is_dir() else load(path)
        except CheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            aside = bad.with_name(f"damaged_{bad.name}_{time.time_ns()}")
            bad.rename(aside)
            log.warning("%s It is %s now, and does not count.", reason, aside)
        return
    raise CheckpointError(
        f"{folder}: none of its {plural(len(damaged), 'checkpoint')} can be read; of the newest: {damaged[0][1]}"
    )


def _check_same_run(config: RunConfig, folder: Path) -> None:
    """Raises CheckpointError where `config` says other than the run that it resumes, in what makes the run."""
    free = {
        "name",
        "runs_dir",
        "init_from",
        "resume",
        "allow_other_shards",
        "builds_on",
        "trainer",
        "logger",
        "sampling",
    }
    saved, said = config_of(folder, type(config.model)), run_folder.as_saved(run_to_dict(config))
    for values in (saved, said):
        _leave_out_how_data_is_read(values["data"], config.allow_other_shards)
    for key in sorted(said.keys() - free):
        if saved.get(key) != said[key]:
            name, was, now = _difference(key, saved.get(key), said[key])
            kept = f" with {name}={was}" if isinstance(was, int | float) and not isinstance(was, bool) else ""
            other = ", or allow_other_shards=true" if name.endswith(".shards") else ""
            raise CheckpointError(
                f"{folder} was trained with {name}={was}, this command says {name}={now}; resume "
                f"needs the run's own command{kept}{other}. To start a new run from its weights use init_from={folder}."
            )


def _leave_out_how_data_is_read(data: dict[str, Any], any_shards: bool) -> None:
    """Of `data`, and of each part of its mixture, what neither the samples nor their order depend on; of shards, and of
    what was encoded, where they lie on disks: what is in them is compared when they are read.

    any_shards: whatever shards they are
    """
    for part in (data, *data["mixture"].values()):
        for key in HOW_DATA_IS_READ:
            part.pop(key, None)
        part["encoded"] = part["encoded"] is not None
        shards = part["shards"] or []
        if any_shards or all(map(is_local, [shards] if isinstance(shards, str) else shards)):
            part.pop("shards")


def config_of(folder: Path, model_class: type) -> dict[str, Any]:
    """The configuration that a run was made with. What it does not say, as an older version had no such key, has its
    default. Raises CheckpointError where it cannot be read."""
    try:
        return run_folder.as_saved(run_to_dict(parse_run(run_folder.read_config(folder), model_class)))
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}/config.yaml is not one that this version can resume: {error}"
        ) from error


def _difference(key: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """The first key at or below `key` whose value differs, and its two values; of other kinds their names."""
    if isinstance(was, dict) and isinstance(now, dict):
        for inner in sorted(was.keys() | now.keys(), key=lambda inner: (inner != "name", inner)):
            if was.get(inner) != now.get(inner):
                return _difference(f"{key}.{inner}", was.get(inner), now.get(inner))
    return key, was, now
