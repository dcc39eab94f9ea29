"""Checkpoints are folders that are complete or do not count."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from same_state import same

from t2i.errors import CheckpointError
from t2i.training import checkpoint, run_folder, state_folder
from t2i.training.resuming import set_damaged_aside
from t2i.training.saving import StateFolders

STATE = {
    "state_dict": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)},
    "ema": {"a": torch.ones(2, 3)},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(4.0), "moment": torch.zeros(3)}}, "lr": 0.1}],
    "t2i": {"config": {}, "extra": {}, "images_seen": 800},
}


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "ldm" / "run" / "checkpoints" / "step_0000100"
    state_folder.write(STATE, path)
    return path


def test_what_is_written_is_read_again(saved):
    assert same(state_folder.read(saved), STATE)
    assert [path.name for path in saved.parent.iterdir()] == ["step_0000100"]
    assert run_folder.checkpoints(saved.parents[1]) == [saved]
    state_folder.check_whole(saved)
    loaded = checkpoint.load(saved)
    assert same(loaded.weights, {"a": STATE["ema"]["a"], "b": STATE["state_dict"]["b"]})
    assert same(checkpoint.load(saved, use_ema=False).weights, STATE["state_dict"])


@pytest.mark.parametrize("links", [True, False])
def test_what_is_frozen_is_written_once(links, tmp_path, monkeypatch):
    """And again where the file system has no hard links. Each checkpoint is whole without the others."""

    def refused(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    saver = StateFolders(lambda path: None, lambda path, error: None)
    frozen = {"codec": torch.arange(4.0)}
    folders = [tmp_path / f"step_000000{i}" for i in range(3)]
    for folder in folders:
        saver.save_checkpoint({**STATE, "frozen": frozen}, folder)
    saver.wait()
    first, *_, last = (folder / state_folder.FROZEN for folder in folders)
    assert first.samefile(last) == links
    shutil.rmtree(folders[0])
    saver = StateFolders(lambda path: None, lambda path, error: None)  # of the next start
    expected = {**STATE, "state_dict": STATE["state_dict"] | frozen}
    assert same(saver.load_checkpoint(folders[2]), expected)
    saver.save_checkpoint({**STATE, "frozen": frozen}, folders[0])
    saver.wait()
    state_folder.check_whole(folders[0])
    assert same(state_folder.read(folders[0]), expected)
    assert first.samefile(last) == links


def test_later_steps_do_not_change_what_is_written(tmp_path):
    weights = {"a": torch.zeros(3), "tied": torch.ones(2)}
    weights["again"] = weights["tied"]
    buffers: list[torch.Tensor] = []
    copied = state_folder.on_host({"state_dict": weights, "other": [weights["a"], 3]}, buffers)
    for value in weights.values():
        value.fill_(7)
    state_folder.write(copied | {"t2i": {}}, tmp_path / "step_0000001")
    assert same(
        load_file(tmp_path / "step_0000001" / state_folder.WEIGHTS),
        {"a": torch.zeros(3), "tied": torch.ones(2), "again": torch.ones(2)},
    )


def test_moments_keep_their_layout_in_memory(tmp_path):
    moment = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    state = {"state_dict": {"a": moment}, "optimizer_states": [moment], "t2i": {}}
    copied = state_folder.on_host(state, [])
    state_folder.write(copied, tmp_path / "step_0000001")
    found = state_folder.read(tmp_path / "step_0000001")
    assert found["optimizer_states"][0].stride() == moment.stride()
    assert same(found, state)


def test_copies_are_written_over_where_they_fit():
    buffers: list[torch.Tensor] = []
    first = state_folder.on_host({"a": torch.zeros(3), "b": torch.zeros(2)}, buffers)
    second = state_folder.on_host({"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(1)}, buffers)
    assert second["a"] is first["a"]
    assert same(second, {"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(1)})
    third = state_folder.on_host({"a": torch.zeros(3, dtype=torch.float64)}, buffers)
    assert same(third, {"a": torch.zeros(3, dtype=torch.float64)})
    assert len(buffers) == 1


@pytest.mark.parametrize("name", [state_folder.WEIGHTS, state_folder.AVERAGE, state_folder.REST])
def test_a_changed_byte_is_found_and_a_missing_one_at_a_glance(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(content)
    assert state_folder.is_complete(saved)
    with pytest.raises(CheckpointError, match=f"{name} is not as it was written"):
        state_folder.check_whole(saved)
    (saved / name).write_bytes(content[:-1])
    assert not state_folder.is_complete(saved)
    assert run_folder.checkpoints(saved.parents[1]) == []


@pytest.mark.parametrize(
    "mark", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {}}}']
)
def test_a_folder_without_a_mark_that_can_be_read_does_not_count(saved, mark):
    (saved / state_folder.MARK).write_text(mark)
    assert not state_folder.is_complete(saved)


def test_an_interruption_at_any_file_leaves_nothing_that_counts(tmp_path, monkeypatch):
    """As the disk gets full, or the process is killed."""
    path = tmp_path / "step_0000001"
    calls = ("save_file", "torch.save", "_described", "_flush", "written_whole")
    for call in calls:

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(f"t2i.training.state_folder.{call}", full)
            with pytest.raises(OSError, match="No space left") as raised:
                state_folder.write(STATE, path)
            assert raised.value.filename == str(path)
        assert list(tmp_path.iterdir()) == []
    shutil.copytree(Path(__file__).parent, path, ignore=lambda *args: ["__pycache__"])  # one without its mark
    state_folder.write(STATE, path)
    assert same(state_folder.read(path), STATE)


def test_a_save_waits_for_the_one_before_and_tells_of_both(tmp_path):
    written, failed = [], []
    io = StateFolders(written.append, lambda path, error: failed.append((path, error.errno)))
    for step in range(3):
        io.save_checkpoint(STATE, tmp_path / f"step_{step:07d}")
    (tmp_path / "file").touch()
    io.save_checkpoint(STATE, tmp_path / "file" / "step_0000003")
    io.wait()
    assert [path.name for path in written] == ["step_0000000", "step_0000001", "step_0000002"]
    assert failed == [(tmp_path / "file" / "step_0000003", errno.ENOTDIR)]
    assert same(io.load_checkpoint(tmp_path / "step_0000002"), STATE)
    io.save_checkpoint({"state_dict": {"a": 3}, "t2i": {}}, tmp_path / "step_0000004")
    with pytest.raises(AttributeError):
        io.wait()
    io.wait()


def test_a_pickle_that_runs_code_is_refused(saved):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(saved / "was here"),)

    torch.save(Evil(), saved / state_folder.REST)
    with pytest.raises(CheckpointError, match=r"rest\.pt cannot be read"):
        state_folder.read(saved)
    assert not (saved / "was here").exists()


KL = (
    "experiment=autoencoder/tiny_kl",
    "trainer.num_images=48",
    "trainer.checkpoint_every_images=8",
    "name=run",
)


def test_old_ones_are_removed_but_for_some(compose_run, train, tmp_path):
    more = ("trainer.keep_checkpoints=1", "trainer.keep_every_images=16", f"runs_dir={tmp_path}")
    folder = train(compose_run(*KL, *more)).folder
    assert [run_folder.images_of(path) for path in run_folder.checkpoints(folder)] == [16, 32, 48]
    assert len(list((folder / "checkpoints").iterdir())) == 3


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_gone_on_from(
    compose_run, train, tmp_path, caplog
):
    whole = train(compose_run(*KL, f"runs_dir={tmp_path / 'whole'}")).folder
    cut = tmp_path / "cut" / whole.parent.name / "run"
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns(run_folder.FINAL_WEIGHTS))
    newest = run_folder.checkpoints(cut)[-1]
    content = bytearray((newest / state_folder.WEIGHTS).read_bytes())
    content[-1] ^= 1
    (newest / state_folder.WEIGHTS).write_bytes(content)
    with caplog.at_level("WARNING", "t2i"):
        train(compose_run(*KL, f"runs_dir={tmp_path / 'cut'}", "resume=auto"))
    (said,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert f"{newest}/weights.safetensors is not as it was written" in said
    assert len(list(newest.parent.glob(f"damaged_{newest.name}_*"))) == 1
    ends = [load_file(folder / run_folder.FINAL_WEIGHTS) for folder in (whole, cut)]
    assert same(*ends)
    for path in run_folder.checkpoints(cut):
        (path / state_folder.REST).write_bytes(b"x" * (path / state_folder.REST).stat().st_size)
    before = sorted(cut.rglob("*"))
    for _ in range(2):  # the second start, as of a job that is put back, takes it for no new run either
        with pytest.raises(
            CheckpointError, match=r"none of its 2 checkpoints can be read; of the newest: .*rest\.pt"
        ):
            train(compose_run(*KL, f"runs_dir={tmp_path / 'cut'}", "resume=auto"))
    assert sorted(cut.rglob("*")) == before


@pytest.mark.parametrize("how", ["cut", "gone", "a folder", "mark"])
def test_one_that_is_damaged_at_a_glance_is_named_too(saved, how, caplog):
    """One whose mark is there was complete once; one without was never."""
    later = saved.with_name("step_0000200")
    shutil.copytree(saved, later)
    file = later / (state_folder.MARK if how == "mark" else state_folder.WEIGHTS)
    if how in ("gone", "a folder"):
        file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how != "gone":
        file.write_bytes(file.read_bytes()[:-2])
    shutil.copytree(saved, saved.with_name("step_0000300"))
    (saved.with_name("step_0000300") / state_folder.MARK).unlink()
    with caplog.at_level("WARNING", "t2i"):
        set_damaged_aside(saved.parents[1])
    (said,) = (record.message for record in caplog.records)
    assert str(later) in said
    assert run_folder.written(saved.parents[1]) == [saved]
    state_folder.remove(saved)
    (saved.parents[1] / run_folder.FINAL_WEIGHTS).touch()
    with pytest.raises(
        CheckpointError, match="holds final weights"
    ):  # which a run from the start would replace
        run_folder.resumed(saved.parents[3], saved.parents[2].name, saved.parents[1].name, "auto")
