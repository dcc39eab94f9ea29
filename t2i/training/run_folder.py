"""Run folders: runs/<stage>/<name>/ with config.yaml, metrics.csv, checkpoints/, samples/, environment.json."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from t2i.errors import CheckpointError
from t2i.files import NO_LINKS, written_whole
from t2i.launch.lock import locked
from t2i.launch.processes import from_first
from t2i.launch.ranks import is_first, job_name
from t2i.schema import check
from t2i.training import state_folder
from t2i.training.checkpoint import images_seen

RUN_FOLDER_VARIABLE = "T2I_RUN_FOLDER"
FINAL_WEIGHTS = "model.safetensors"
CHECKPOINT = re.compile(r"step_\d+(\.ckpt)?")  # .ckpt: of an older version


def named(runs_dir: str | Path, stage: str, name: str | None) -> Path:
    """The folder of the run of that name, or of this job's, whether it is there or not. Raises ConfigError where
    neither has a name."""
    name = name or job_name(os.environ)
    check(name is not None, "resume", "auto", "that with name=NAME, as only a name tells which run is meant")
    return Path(runs_dir) / stage / str(name)


def resumed(runs_dir: str, stage: str, name: str | None, resume: str | None) -> Path | None:
    """The run folder that `resume` of a configuration means; None for a new run. Raises CheckpointError or
    ConfigError."""
    if resume is None:
        return None
    if resume == "auto":
        folder = named(runs_dir, stage, name)
        if not written(folder) and (folder / FINAL_WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder} holds final weights ({FINAL_WEIGHTS}) and no checkpoint to resume from; allowed: another "
                f"name, with init_from={folder} to start from them."
            )
        return folder if written(folder) else None
    if resume == "latest":
        found = newest_run(runs_dir, stage)
        if found is None:
            raise CheckpointError(f"resume=latest found no run with a checkpoint in {runs_dir}/{stage}.")
        return found
    folder = Path(resume)
    check(folder.is_dir(), "resume", resume, "latest, auto or the folder of a run")
    if not written(folder):
        raise CheckpointError(f"{folder} holds no checkpoint to resume from (checkpoints/step_*).")
    return folder


def create(runs_dir: str | Path, stage: str, name: str | None, reuse: bool = False) -> Path:
    """The folder of a new run, made if absent, with runs/<stage>/latest pointing to it.

    Further processes of the same run (Lightning starts them with this one's environment) get the same
    folder. A name that was used before gets "-2", "-3", ... so that no run is ever written over; with `reuse` it is the
    same run, started again.
    """
    if inherited := os.environ.get(RUN_FOLDER_VARIABLE):
        return Path(inherited)
    name = name or job_name(os.environ) or time.strftime("%Y-%m-%d_%H-%M-%S")
    if reuse:
        (folder := named(runs_dir, stage, name)).mkdir(parents=True, exist_ok=True)
        return enter(folder)
    parent, copy = Path(runs_dir) / stage, 1
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / name
    while True:
        # Some systems take "Trial" and "trial" for one name, or two ways of writing one letter: nowhere two runs.
        taken = {_folded(path.name) for path in parent.iterdir()}
        if _folded(folder.name) not in taken:
            with suppress(FileExistsError):
                folder.mkdir()
                return enter(folder)
        copy += 1
        folder = parent / f"{name}-{copy}"


@contextmanager
def opened(
    runs_dir: str | Path, stage: str, name: str | None, resumed: Path | None, reuse: bool = False
) -> Iterator[Path]:
    """The folder of a run while it goes on: `resumed`, or a new one (see `create`). One that was not there before is
    removed again where an error ends the block before anything was trained."""
    # Of the processes of a run one owns the folder: the first, also of those that Lightning starts.
    own = not os.environ.get(RUN_FOLDER_VARIABLE) and is_first(os.environ)
    # It may be another process's, or hold what its job has to say.
    is_new = resumed is None and not (reuse and named(runs_dir, stage, name).exists())
    latest = latest_of(runs_dir, stage)
    folder = from_first(lambda: enter(resumed) if resumed else create(runs_dir, stage, name, reuse))
    os.environ[RUN_FOLDER_VARIABLE] = str(folder)
    try:
        with locked(folder) if own else nullcontext():
            from_first(lambda: _remove_left(folder) if own else None)  # before another one writes here
            yield folder
    except BaseException:
        if is_new and own:
            remove_unused(folder, latest)
        raise
    finally:
        leave()


def _remove_left(folder: Path) -> None:
    """What a process that was killed had not written to its end."""
    for left in (*folder.glob(".*.unfinished"), *folder.glob("checkpoints/.*.unfinished")):
        state_folder.remove(left)


def latest_of(runs_dir: str | Path, stage: str) -> Path | None:
    """Where runs/<stage>/latest points."""
    link = Path(runs_dir) / stage / "latest"
    return link.readlink() if link.is_symlink() else None


def remove_unused(folder: Path, latest: Path | None) -> None:
    """Removes the folder of a run that came to nothing, and lets its stage's link point to `latest`, as before it."""
    if not _holds_results(folder):
        shutil.rmtree(folder, ignore_errors=True)
        link = folder.parent / "latest"
        link.unlink(missing_ok=True)
        if latest is not None:
            link.symlink_to(latest)


def _holds_results(folder: Path) -> bool:
    kept = (*folder.glob("*.csv"), *folder.glob("not_finite.json"), *folder.glob("samples/*"))
    return bool(kept or checkpoints(folder))


def enter(folder: Path) -> Path:
    """Makes `folder` the run of this process and of those it starts, and the stage's latest."""
    os.environ[RUN_FOLDER_VARIABLE] = str(folder)
    for sub in ("checkpoints", "samples"):
        (folder / sub).mkdir(exist_ok=True)
    link = folder.parent / "latest"
    fresh = link.with_name(f".latest.{uuid.uuid4().hex[:8]}")  # processes in containers have the same numbers
    try:
        fresh.symlink_to(folder.name)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise OSError(error.errno, error.strerror, str(link)) from error
    else:
        fresh.replace(link)
    return folder


def leave() -> None:
    """Ends what `enter` began: the next run of this process gets a folder of its own."""
    os.environ.pop(RUN_FOLDER_VARIABLE, None)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """config.yaml: the resolved configuration."""
    with written_whole(folder / "config.yaml") as unfinished:
        OmegaConf.save(OmegaConf.create(config), unfinished)


def as_saved(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as `read_config` would give it back: tuples become lists."""
    values = OmegaConf.to_container(OmegaConf.create(config))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run, as a plain mapping. Raises CheckpointError where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no config.yaml.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be read as a run's configuration: {reason}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read as a run's configuration: it holds no keys.")
    return {str(key): value for key, value in values.items()}


def write_environment(folder: Path, device: str) -> None:
    """environment.json: versions, commit and device, for whoever has to repeat the run."""
    packages = ("t2i", "torch", "lightning", "webdataset", "transformers", "open_clip_torch", "numpy")
    values = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "commit": _commit(),
        "device": device,
        "host": platform.node(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    _write_json(folder / "environment.json", values)


def write_summary(folder: Path, complete: bool, images_seen: int, seconds: float) -> None:
    """summary.json: how far the run came, and the seconds of training over all its resumptions."""
    before = read_summary(folder).get("seconds", 0.0)
    values = {"complete": complete, "images_seen": images_seen, "seconds": round(before + seconds, 1)}
    _write_json(folder / "summary.json", values)


def read_summary(folder: Path) -> dict[str, Any]:
    """What `write_summary` wrote; empty for a run that was never stopped in order, and where it cannot be read."""
    try:
        found = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def runs(runs_dir: str | Path, stage: str) -> list[Path]:
    """Run folders of a stage that hold a checkpoint, oldest checkpoint first."""
    parent = Path(runs_dir) / stage
    folders = (
        [p for p in parent.glob("*") if not p.is_symlink() and checkpoints(p)] if parent.is_dir() else []
    )
    return sorted(folders, key=lambda p: checkpoints(p)[-1].stat().st_mtime)


def newest_run(runs_dir: str | Path, stage: str) -> Path | None:
    """The run of `stage` with the newest checkpoint."""
    return found[-1] if (found := runs(runs_dir, stage)) else None


def newest_lower(runs_dir: str | Path, stage: str, below_px: int) -> tuple[Path | None, list[Path]]:
    """As `newest_finished`, of the runs of `stage` with a checkpoint and at a lower resolution."""
    return newest_finished(
        runs_dir,
        [stage],
        lambda p: bool(checkpoints(p)) and read_config(p)["resolution"]["size_px"] < below_px,
    )


def newest_finished(
    runs_dir: str | Path,
    stages: Iterable[str],
    fits: Callable[[Path], bool] = lambda folder: True,
) -> tuple[Path | None, list[Path]]:
    """The run of these stages with the newest final weights, of training or of `t2i convert`, or else the newest with a
    checkpoint; and the unfinished ones that are newer, newest first. fits: whether a run's folder counts"""
    parents = [Path(runs_dir) / stage for stage in stages]
    there = [p for parent in parents if parent.is_dir() for p in parent.iterdir()]
    folders = [p for p in there if not p.is_symlink() and (p / "config.yaml").is_file()]
    weights = {p: weights_file(p) for p in folders if checkpoints(p) or (p / FINAL_WEIGHTS).is_file()}
    newest_first = sorted(weights, key=lambda p: weights[p].stat().st_mtime, reverse=True)
    newest_first = [p for p in newest_first if fits(p)]
    for i, folder in enumerate(newest_first):
        if weights[folder].name == FINAL_WEIGHTS:
            return folder, newest_first[:i]
    return (newest_first[0], []) if newest_first else (None, [])


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, in the order of their steps."""
    return [path for path in written(folder) if path.suffix or state_folder.is_complete(path)]


def written(folder: Path) -> list[Path]:
    """The same with those that were damaged since."""
    found = (path for path in (folder / "checkpoints").glob("step_*") if CHECKPOINT.fullmatch(path.name))
    return sorted((p for p in found if p.suffix or (p / state_folder.MARK).exists()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps that were done when it was written."""
    return int(checkpoint.stem.removeprefix("step_"))


def images_of(checkpoint: Path) -> int:
    """The images that were seen when it was written; 0 where it does not say."""
    header = state_folder.header(checkpoint) if checkpoint.is_dir() else None
    found = header.get("images_seen") if isinstance(header, dict) else None
    return found if isinstance(found, int) else 0


def run_of(place: str | Path) -> Path | None:
    """The run folder that a place means, itself or the one that a file of weights lies in; None where there is none."""
    path = Path(place)
    return next(
        (folder for folder in (path, path.parent, path.parent.parent) if (folder / "config.yaml").is_file()),
        None,
    )


def weights_file(place: str | Path) -> Path:
    """What to read weights from, given a run folder, a checkpoint or a file: of a run the final weights, or else the
    checkpoint with the most steps. Raises CheckpointError with a sentence where there is none."""
    path = Path(place)
    if path.is_file() or state_folder.is_complete(path):
        return path
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist; give a run folder, a checkpoint or a .safetensors file."
        )
    saved = checkpoints(path)
    final = path / FINAL_WEIGHTS
    if final.is_file() and (not saved or _is_of_the_end(final, saved[-1])):
        return final
    if not saved:
        raise CheckpointError(f"{path} holds no checkpoint yet (checkpoints/step_*, {FINAL_WEIGHTS}).")
    return saved[-1]


def _is_of_the_end(final: Path, checkpoint: Path) -> bool:
    """Whether the run did not go on since: by the images that both have seen, as a copy's files have other times; by
    these where an older version wrote them."""
    said, seen = images_seen(final), images_of(checkpoint)
    if said is not None and seen:
        return said >= seen
    return final.stat().st_mtime >= checkpoint.stat().st_mtime


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=2) + "\n")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that the code is at, where the code is in a git checkout."""
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
