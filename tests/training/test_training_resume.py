"""Runs that ended somewhere between their last checkpoint and their final weights, and shards that were replaced."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from t2i.config import parse_run, run_to_dict
from t2i.errors import CheckpointError
from t2i.families.autoencoder.stage import Stage
from t2i.training import checkpoint, run_folder, state_folder
from t2i.training.callbacks import Pictures
from t2i.training.resuming import resumed_run
from t2i.training.saving import Checkpoints

ARGUMENTS = (
    *("experiment=autoencoder/tiny_kl", "ema=short", "name=run", "trainer.num_images=32"),
    *("trainer.checkpoint_every_images=16", "trainer.sample_every_images=16", "logger.tensorboard=false"),
)


@pytest.fixture(scope="module")
def whole(compose_run, train, tmp_path_factory) -> Path:
    """Four steps, the last of them a multiple of all that comes every so often."""
    return train(compose_run(*ARGUMENTS, f"runs_dir={tmp_path_factory.mktemp('runs')}")).folder


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """What was done, in order: train, draw, save."""
    done: list[str] = []
    for owner, name, word in (
        (Stage, "training_step", "train"),
        (Pictures, "draw", "draw"),
        (Checkpoints, "save", "save"),
    ):
        original = getattr(owner, name)

        def counting(*args, _original=original, _word=word, **kwargs):
            done.append(_word)
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)
    return done


def copied(whole: Path, folder: Path, *gone: str) -> Path:
    cut = folder / "autoencoder" / "run"
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns(*gone))
    return cut


def test_the_last_picture_and_checkpoint_are_made_once(compose_run, train, counted, tmp_path):
    train(compose_run(*ARGUMENTS, f"runs_dir={tmp_path}"))
    assert counted == ["train", "train", "draw", "save", "train", "train", "draw", "save"]


def test_every_file_has_the_mode_that_the_umask_gives(whole):
    before = os.umask(0)
    os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in whole.rglob("*") if path.is_file()}
    assert modes.keys() >= {
        "rest.pt",
        "complete.json",
        run_folder.FINAL_WEIGHTS,
        "metrics.csv",
        "config.yaml",
    }
    assert set(modes.values()) == {0o666 & ~before}


@pytest.mark.parametrize(
    "gone",
    [
        (run_folder.FINAL_WEIGHTS,),
        (run_folder.FINAL_WEIGHTS, "summary.json", "reconstructions_000004.png"),
    ],
)
def test_a_run_killed_before_its_final_weights_ends_as_if_it_were_not(
    whole, compose_run, train, counted, tmp_path, gone
):
    cut = copied(whole, tmp_path, *gone)
    for left in ("checkpoints/.step_0000004.unfinished", ".model.safetensors.0.unfinished"):
        (cut / left).touch()  # killed while it wrote
    result = train(compose_run(*ARGUMENTS, f"runs_dir={tmp_path}", "resume=latest"))
    assert counted == ["draw", "save"]
    assert (result.folder, result.complete, result.images_seen) == (cut, True, 32)
    assert sorted(path.name for path in cut.rglob("*")) == sorted(path.name for path in whole.rglob("*"))
    ends = [load_file(folder / run_folder.FINAL_WEIGHTS) for folder in (cut, whole)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    last = [run_folder.checkpoints(folder)[-1] for folder in (cut, whole)]
    assert last[0].name == last[1].name
    states = [state_folder.weights(path)[0] for path in last]
    assert all(torch.equal(states[0][n], v) for n, v in states[1].items())
    assert (cut / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_resuming_a_complete_run_changes_nothing(whole, compose_run, train, counted, tmp_path):
    cut = copied(whole, tmp_path)
    for path in cut.rglob("*"):  # as a copy that does not keep times; weights older than checkpoints
        path.touch()
    kept = {p: p.read_bytes() for p in cut.rglob("*") if p.suffix in (".safetensors", ".pt", ".png", ".csv")}
    for _ in range(2):
        result = train(compose_run(*ARGUMENTS, f"runs_dir={tmp_path}", "resume=latest"))
        assert result.complete
    assert counted == []
    assert {path: path.read_bytes() for path in kept} == kept
    assert {path for path in cut.rglob("*") if path.suffix in (".safetensors", ".pt", ".png")} <= kept.keys()


def test_a_complete_run_can_be_made_longer(whole, compose_run, train, counted, tmp_path):
    cut = copied(whole, tmp_path)
    assert checkpoint.images_seen(cut / run_folder.FINAL_WEIGHTS) == 32
    train(compose_run(*ARGUMENTS, "trainer.num_images=48", f"runs_dir={tmp_path}", "resume=latest"))
    assert counted.count("train") == 2
    assert checkpoint.images_seen(cut / run_folder.FINAL_WEIGHTS) == 48


def test_shards_that_were_replaced_are_refused_unless_told(
    whole, compose_run, train, shapes_shards, tmp_path
):
    """By others of the same name, number of samples and size."""
    shard = next((shapes_shards / "train").glob("*.tar"))
    own = tmp_path / "00000.tar"
    shutil.copy(shard, own)
    start = (*ARGUMENTS, f"data.shards={own}", f"runs_dir={tmp_path}")
    train(compose_run(*start))
    longer = [*start, "trainer.num_images=48", "resume=latest"]
    content = bytearray(own.read_bytes())
    place = content.rindex(b"a ")  # the last caption's or description's
    content[place] ^= 32
    own.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"data\.shards: these are not the shards .*allow_other_shards=true"
    ):
        train(compose_run(*longer))
    assert train(compose_run(*longer, "allow_other_shards=true", "seed=0")).images_seen == 48
    # From here on those are the run's; a copy elsewhere, with other times, is the same.
    own.touch()
    assert train(compose_run(*longer, "trainer.num_images=56")).images_seen == 56


def test_how_data_is_read_may_change(whole, compose_run, train, shapes_shards, shapes_overrides, tmp_path):
    """And where it lies. What comes of it stays as it was."""
    cut = copied(whole, tmp_path, run_folder.FINAL_WEIGHTS, "step_0000004")
    shutil.copytree(shapes_shards, tmp_path / "elsewhere")
    moved = [each.replace(str(shapes_shards), str(tmp_path / "elsewhere")) for each in shapes_overrides]
    assert moved != shapes_overrides
    reading = ("num_workers=1", "cache_mib=0", "shard_cache_gib=1", "deadline_s=17", "max_bad_share=0.5")
    typed = (*moved, *(f"data.{each}" for each in reading))
    assert train(compose_run(*ARGUMENTS, *typed, f"runs_dir={tmp_path}", "resume=latest")).complete
    ends = [load_file(folder / run_folder.FINAL_WEIGHTS) for folder in (cut, whole)]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


@pytest.mark.parametrize("key", ["data.shards", "data.mixture"])
def test_where_shards_cannot_be_compared_they_stay(whole, compose_run, tmp_path, key):
    """Behind a URL only their sizes tell them from others."""
    cut = copied(whole, tmp_path)
    path = cut / "config.yaml"
    values = {
        place: f"{place}/{{0..9}}.tar" for place in ("http://a/b", "http://c/d", "/local", "pipe:cat /local")
    }
    data = yaml.safe_load(path.read_text())["data"]

    def of(place: str) -> dict:
        if key == "data.shards":
            return data | {"shards": values[place]}
        return data | {"shards": None, "mixture": {"one": {"shards": [values[place]]}}}

    def resume(then: str, now: str, *more: str) -> None:
        saved = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(saved | {"data": of(then)}))
        config = compose_run(*ARGUMENTS, f"runs_dir={tmp_path}", "resume=latest", *more)
        typed = run_to_dict(config) | {"data": of(now)}
        resumed_run(parse_run(typed, type(config.model)))

    resume("http://a/b", "http://a/b")
    for then, now in (("http://a/b", "http://c/d"), ("http://a/b", "/local"), ("/local", "pipe:cat /local")):
        with pytest.raises(
            CheckpointError, match=rf"{key}.*needs the run's own command, or allow_other_shards"
        ):
            resume(then, now)
        resume(then, now, "allow_other_shards=true")


def test_what_was_encoded_stays_so(whole, compose_run, tmp_path):
    copied(whole, tmp_path)
    config = compose_run(*ARGUMENTS, f"runs_dir={tmp_path}", "resume=latest", "data.encoded=somewhere")
    with pytest.raises(CheckpointError, match=r"data\.encoded=False, this command says data\.encoded=True"):
        resumed_run(config)


def test_a_checkpoint_of_before_fingerprints_is_taken(whole, compose_run, train, tmp_path):
    """One file, as they were."""
    cut = copied(whole, tmp_path, run_folder.FINAL_WEIGHTS, "step_0000004")
    (path,) = run_folder.checkpoints(cut)
    state = state_folder.read(path)
    del state["ShardData"], state["t2i"]["skipped_steps"]
    state_folder.remove(path)
    torch.save(state, path.with_name("step_000002.ckpt"))
    assert train(compose_run(*ARGUMENTS, f"runs_dir={tmp_path}", "resume=latest")).images_seen == 32


def test_what_the_configuration_of_an_older_version_lacks_has_its_default(
    whole, compose_run, train, tmp_path
):
    cut = copied(whole, tmp_path)
    path = cut / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    for lacking in (saved, saved["data"], saved["optimizer"]):
        for key in ("allow_other_shards", "shuffle_window_shards", "muon_scale"):
            lacking.pop(key, None)
    path.write_text(yaml.safe_dump(saved))
    longer = (*ARGUMENTS, "trainer.num_images=40", f"runs_dir={tmp_path}", "resume=latest")
    assert train(compose_run(*longer)).images_seen == 40
    said = r"shuffle_window_shards=2; resume needs the run's own command with data\.shuffle_window_shards=16\. To"
    with pytest.raises(CheckpointError, match=said):
        train(compose_run(*longer, "data.shuffle_window_shards=2"))
    path.write_text(yaml.safe_dump(saved | {"of_another_version": 1}))
    with pytest.raises(
        CheckpointError, match=r"config\.yaml is not one .* of_another_version is not a known key"
    ):
        train(compose_run(*longer))


def test_a_longer_run_keeps_the_key_that_followed_its_length(whole, compose_run, tmp_path):
    """The temperature of Gumbel's codes falls over trainer.num_images unless another number is said."""
    cut = copied(whole, tmp_path)
    own = (*ARGUMENTS, "codec=gumbel", f"runs_dir={tmp_path}")
    run_folder.write_config(cut, run_to_dict(compose_run(*own)))
    longer = (*own, "trainer.num_images=40", "resume=latest")
    with pytest.raises(CheckpointError) as refused:
        resumed_run(compose_run(*longer))
    assert "=40; resume needs the run's own command with codec.anneal_images=32. To" in str(refused.value)
    assert resumed_run(compose_run(*longer, "codec.anneal_images=32")) == cut


def test_another_kind_is_said_by_its_name(whole, compose_run, train):
    """Not by the first key that one of the two lacks."""
    typed = (*ARGUMENTS, "codec=vq", f"runs_dir={whole.parents[1]}", "resume=latest")
    with pytest.raises(CheckpointError, match=r"was trained with codec\.name=kl, this .* codec\.name=vq;"):
        train(compose_run(*typed))


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"- a", b"text", b""])
def test_a_configuration_that_is_damaged(whole, compose_run, train, tmp_path, content):
    cut = copied(whole, tmp_path)
    (cut / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml (cannot be read as|is not one that)"):
        train(compose_run(*ARGUMENTS, f"runs_dir={tmp_path}", "resume=latest"))


def test_a_damaged_summary_is_written_anew(whole, compose_run, train, tmp_path):
    cut = copied(whole, tmp_path)
    (cut / "summary.json").write_text("{")
    assert train(compose_run(*ARGUMENTS, f"runs_dir={tmp_path}", "resume=latest")).complete
    assert run_folder.read_summary(cut)["images_seen"] == 32
