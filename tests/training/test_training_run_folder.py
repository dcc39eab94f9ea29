"""Run folders: names, the newest, what is found in them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from t2i.errors import CheckpointError, UserError
from t2i.launch.lock import locked
from t2i.training import run_folder, state_folder
from t2i.training.checkpoint import save_final


@pytest.fixture(autouse=True)
def _own_process(monkeypatch):
    """As in a process that no run was started in."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv(run_folder.RUN_FOLDER_VARIABLE, "")
    yield
    run_folder.leave()


def new_run(
    runs_dir: Path, name: str, size_px: int = 32, steps: tuple[int, ...] = (), time_s: int = 0
) -> Path:
    """A finished run with empty checkpoints, written `time_s` after the epoch."""
    folder = run_folder.create(runs_dir, "ldm", name)
    run_folder.leave()
    run_folder.write_config(folder, {"resolution": {"size_px": size_px}})
    for step in steps:
        saved(folder, step, time_s)
    return folder


def saved(folder: Path, step: int, time_s: int) -> Path:
    """A complete checkpoint without files."""
    path = folder / "checkpoints" / f"step_{step:07d}"
    path.mkdir()
    (path / state_folder.MARK).write_text('{"files": {}}')
    os.utime(path, (time_s, time_s))
    return path


def touch(path: Path, time_s: int) -> None:
    path.touch()
    os.utime(path, (time_s, time_s))


def test_a_name_that_was_used_is_never_written_over(tmp_path):
    names = [new_run(tmp_path, "trial").name for _ in range(3)]
    assert names == ["trial", "trial-2", "trial-3"]
    assert (tmp_path / "ldm" / "latest").resolve() == (tmp_path / "ldm" / "trial-3").resolve()


def test_the_processes_of_a_run_share_its_folder(tmp_path):
    folder = run_folder.create(tmp_path, "ldm", "trial")
    assert run_folder.create(tmp_path, "ldm", "trial") == folder  # as one that was started by this one
    run_folder.leave()
    assert run_folder.create(tmp_path, "ldm", "trial") != folder


def test_without_a_name_it_is_the_job_or_the_time(tmp_path, monkeypatch):
    timed = run_folder.create(tmp_path, "ldm", None)
    run_folder.leave()
    assert timed.name.startswith("20")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert run_folder.create(tmp_path, "ldm", None).name == "4711"


def test_latest_moves_with_the_folder_it_lies_in(tmp_path):
    new_run(tmp_path / "runs", "trial")
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "ldm" / "latest").resolve().name == "trial"


def test_the_newest_run_has_the_newest_checkpoint(tmp_path):
    """Not the newest folder, the most steps or the last name; runs without a checkpoint do not count."""
    assert run_folder.newest_run(tmp_path, "ldm") is None
    b = new_run(tmp_path, "b", size_px=32, steps=(10, 20), time_s=2_000)
    a = new_run(tmp_path, "a", size_px=64, steps=(5,), time_s=3_000)
    c = new_run(tmp_path, "c", size_px=32, steps=(900,), time_s=1_000)
    new_run(tmp_path, "d", size_px=32)
    assert run_folder.newest_run(tmp_path, "ldm") == a
    assert run_folder.newest_lower(tmp_path, "ldm", 64) == (b, [])
    assert run_folder.newest_lower(tmp_path, "ldm", 32) == (None, [])
    assert run_folder.newest_run(tmp_path, "autoencoder") is None
    saved(c, 910, 4_000)
    assert run_folder.newest_run(tmp_path, "ldm") == c
    (b / run_folder.FINAL_WEIGHTS).write_bytes(b"")
    assert run_folder.newest_lower(tmp_path, "ldm", 64) == (b, [])
    os.utime(b / run_folder.FINAL_WEIGHTS, (2_500, 2_500))
    assert run_folder.newest_lower(tmp_path, "ldm", 64) == (b, [c])  # which did not come to its end


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path):
    folder = new_run(tmp_path, "a", steps=(100, 20, 3_000))
    (folder / "checkpoints" / "step_0004000").mkdir()  # of a save that was cut off
    assert [path.stem for path in run_folder.checkpoints(folder)] == [
        "step_0000020",
        "step_0000100",
        "step_0003000",
    ]


def test_checkpoints_are_ordered_by_number_not_by_text(tmp_path):
    folder = new_run(tmp_path, "a", steps=(999_999, 1_000_000, 2_000_000, 10_000_000))
    (folder / "checkpoints" / "step_best.ckpt").touch()  # somebody's own
    steps = [run_folder.step_of(path) for path in run_folder.checkpoints(folder)]
    assert steps == [999_999, 1_000_000, 2_000_000, 10_000_000]
    assert run_folder.weights_file(folder).name == "step_10000000"


@pytest.mark.parametrize(("first", "second"), [("Trial", "trial"), ("caf\u00e9", "cafe\u0301")])
def test_names_that_some_systems_take_for_one_are_two_nowhere(tmp_path, first, second):
    assert new_run(tmp_path, first).name == first
    assert new_run(tmp_path, second).name == f"{second}-2"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_trained_nothing_leaves_no_folder(tmp_path, error):
    earlier = new_run(tmp_path, "earlier")

    def begin(name: str, result: str | None = None, resumed: Path | None = None) -> None:
        with run_folder.opened(tmp_path, "ldm", name, resumed) as folder:
            run_folder.write_config(folder, {})
            if result is not None:
                (folder / result).touch()
            raise error

    with pytest.raises(error):
        begin("empty")
    assert sorted(path.name for path in (tmp_path / "ldm").iterdir()) == ["earlier", "latest"]
    assert (tmp_path / "ldm" / "latest").resolve() == earlier.resolve()
    for result in ("metrics.csv", "checkpoints/step_000001.ckpt", "samples/a.png", "not_finite.json"):
        name = Path(result).stem
        with pytest.raises(error):
            begin(name, result)
        assert (tmp_path / "ldm" / "latest").resolve().name == name
    with pytest.raises(error):
        begin("", resumed=earlier)
    assert earlier.is_dir()


def test_a_folder_that_was_there_before_stays(tmp_path, monkeypatch):
    """It may be that of a process which goes on (the lock is its own then), or have what its job has to say."""
    monkeypatch.setattr(run_folder, "locked", lambda folder: locked(folder, patience_s=0))
    place = tmp_path / "ldm" / "name"
    place.mkdir(parents=True)
    (place / "slurm.json").touch()
    with run_folder.opened(tmp_path, "ldm", "name", None, reuse=True) as folder:
        run_folder.leave()  # as in a process of its own
        second = run_folder.opened(tmp_path, "ldm", "name", None, reuse=True)
        with pytest.raises(UserError, match="is written by process"), second:
            pass
        assert (folder / "checkpoints").is_dir()
    with pytest.raises(ZeroDivisionError), run_folder.opened(tmp_path, "ldm", "name", None, reuse=True):
        raise ZeroDivisionError
    assert (place / "slurm.json").is_file()
    with pytest.raises(ZeroDivisionError), run_folder.opened(tmp_path, "ldm", "new", None, reuse=True):
        raise ZeroDivisionError
    assert not (tmp_path / "ldm" / "new").exists()


def test_weights_are_the_final_ones_unless_the_run_went_on(tmp_path):
    folder = new_run(tmp_path, "a", steps=(1, 2), time_s=1_000)
    assert run_folder.weights_file(folder).name == "step_0000002"
    touch(folder / run_folder.FINAL_WEIGHTS, 1_001)
    assert run_folder.weights_file(folder).name == run_folder.FINAL_WEIGHTS
    saved(folder, 3, 2_000)
    assert run_folder.weights_file(folder).name == "step_0000003"
    file = folder / "checkpoints" / "step_0000001"
    assert run_folder.weights_file(file) == file
    assert run_folder.weights_file(tmp_path / "ldm" / "latest").resolve().parent.parent == folder.resolve()


def test_a_copy_of_a_run_has_the_same_final_weights(tmp_path):
    """Files of a copy have the times at which they were copied, in any order."""
    folder = new_run(tmp_path, "a")

    def saved_with(images: int, time_s: int) -> Path:
        path = folder / "checkpoints" / f"step_{images:07d}"
        path.mkdir()
        (path / state_folder.MARK).write_text(json.dumps({"files": {}, "t2i": {"images_seen": images}}))
        os.utime(path, (time_s, time_s))
        return path

    saved_with(64, 2_000)
    final = folder / run_folder.FINAL_WEIGHTS
    save_final({"a": torch.ones(1)}, {"config": {}, "extra": {}, "images_seen": 64}, final)
    os.utime(final, (1_000, 1_000))
    assert run_folder.weights_file(folder) == final
    later = saved_with(96, 500)  # the run was made longer, and the clock set back
    assert run_folder.weights_file(folder) == later


def test_the_link_to_the_latest_is_made_wherever_there_are_links(tmp_path, monkeypatch):
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / f".latest.{os.getpid()}").symlink_to("killed")  # of a process with this one's number
    assert new_run(tmp_path, "a").samefile(tmp_path / "ldm" / "latest")

    def refused(link, target):
        raise OSError(number, os.strerror(number), target, None, str(link))

    monkeypatch.setattr(Path, "symlink_to", refused)
    number = errno.EPERM  # as exFAT
    assert new_run(tmp_path, "b").is_dir()
    number = errno.EROFS
    with pytest.raises(OSError, match="Read-only") as raised:
        new_run(tmp_path, "c")
    assert raised.value.filename == str(tmp_path / "ldm" / "latest")
    assert (tmp_path / "ldm" / "latest").resolve().name == "a"


def test_what_cannot_be_found_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; give a run folder, a checkpoint or"):
        run_folder.weights_file(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="a holds no checkpoint yet"):
        run_folder.weights_file(new_run(tmp_path, "a"))
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.yaml"):
        run_folder.read_config(tmp_path)


def test_the_configuration_comes_back(tmp_path):
    values = {"seed": 3, "name": None, "data": {"shards": ["a", "b"]}, "rate": 1e-4, "wandb": "off"}
    run_folder.write_config(tmp_path, values)
    assert run_folder.read_config(tmp_path) == values


def test_the_summary_adds_up_the_seconds_of_all_resumptions(tmp_path):
    assert run_folder.read_summary(tmp_path) == {}
    run_folder.write_summary(tmp_path, complete=False, images_seen=8, seconds=1.5)
    run_folder.write_summary(tmp_path, complete=True, images_seen=32, seconds=2.0)
    assert run_folder.read_summary(tmp_path) == {"complete": True, "images_seen": 32, "seconds": 3.5}


def test_the_environment_names_versions_commit_and_device(tmp_path):
    run_folder.write_environment(tmp_path, device="cpu")
    values = json.loads((tmp_path / "environment.json").read_text())
    assert values["device"] == "cpu"
    assert values["packages"]["torch"]
    assert {"commit", "python", "host", "started"} <= values.keys()
