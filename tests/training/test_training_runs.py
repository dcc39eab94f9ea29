"""Whole runs of the small experiments: what they leave behind, and how they stop and go on."""

from __future__ import annotations

import csv
import errno
import logging
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from t2i.errors import CheckpointError
from t2i.nn.dit import enlarge_patches
from t2i.training import checkpoint, run_folder, state_folder

KL = "experiment=autoencoder/tiny_kl"


@pytest.fixture(scope="module")
def codec_run(compose_run, train, tmp_path_factory) -> Path:
    """Six steps of eight pictures, with everything that a run can leave behind."""
    runs_dir = tmp_path_factory.mktemp("runs")
    config = compose_run(
        *(KL, "ema=short", "name=trial", f"runs_dir={runs_dir}", "logger.tensorboard=true"),
        *("trainer.num_images=48", "trainer.checkpoint_every_images=8", "trainer.sample_every_images=20"),
        *("trainer.keep_checkpoints=3", "trainer.log_every_steps=2"),
    )
    return train(config).folder


def saved(folder: Path) -> dict:
    return state_folder.read(run_folder.checkpoints(folder)[-1])


def test_the_newest_checkpoints_are_kept(codec_run):
    names = [path.name for path in sorted((codec_run / "checkpoints").iterdir())]
    assert names == ["step_0000004", "step_0000005", "step_0000006"]


def test_pictures_come_every_so_many_images_and_at_the_end(codec_run):
    """Multiples of 20 are passed by the third step (24 images), the fifth (40) and the last (48)."""
    paths = sorted((codec_run / "samples").iterdir())
    assert [path.name for path in paths] == [f"reconstructions_{step:06d}.png" for step in (3, 5, 6)]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.size == (8 * 34 - 2, 4 * 34 - 2)  # 12 held-out pictures and their reconstructions
            assert len(picture.getcolors(2**16)) > 100


def test_a_picture_that_a_full_disk_refuses_does_not_end_the_run(
    compose_run, train, tmp_path, monkeypatch, caplog
):
    def refused(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("t2i.training.callbacks.save_png", refused)
    arguments = ("experiment=autoencoder/tiny_kl", "trainer.num_images=8", f"runs_dir={tmp_path}")
    with caplog.at_level("WARNING", "t2i"):
        result = train(compose_run(*arguments))
    assert result.complete
    assert (result.folder / run_folder.FINAL_WEIGHTS).is_file()
    (said,) = (record.message for record in caplog.records)
    assert said.endswith(".png is not written: No space left on device; training goes on")


def test_tensorboard_has_the_metrics_and_the_pictures(codec_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(codec_run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert [event.step for event in events.Images("reconstructions")] == [3, 5, 6]


def test_metrics_are_means_over_the_steps_since_the_last_row(codec_run, compose_run, train, tmp_path):
    each = train(compose_run(KL, "ema=short", "trainer.num_images=48", f"runs_dir={tmp_path}")).folder
    losses = [float(row["loss"]) for row in rows(each)]
    assert len(losses) == 6
    assert [float(row["loss"]) for row in rows(codec_run)] == pytest.approx(
        [(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4)]
    )


def test_a_run_can_be_repeated_from_what_it_says_of_itself(codec_run):
    assert run_folder.read_config(codec_run)["trainer"]["num_images"] == 48
    assert (codec_run / "environment.json").is_file()
    assert run_folder.read_summary(codec_run)["complete"] is True
    assert (codec_run.parent / "latest").resolve() == codec_run.resolve()


def test_the_codecs_average_leaves_the_discriminator_out(codec_run):
    state = saved(codec_run)
    raw, averaged = state["state_dict"], state["ema"]
    trained = {name for name in raw if name.startswith("codec.") and name != "codec.latent_scale"}
    assert averaged.keys() == trained
    assert any(name.startswith("discriminator.") for name in raw)
    final = load_file(codec_run / run_folder.FINAL_WEIGHTS)
    assert final.keys() == trained | {"codec.latent_scale"}
    for name, value in final.items():
        assert torch.equal(value, averaged.get(name, raw[name])), name
    assert any(not torch.equal(averaged[name], raw[name]) for name in trained)


@pytest.fixture(scope="module")
def ldm_run(codec_run, compose_run, train) -> Path:
    runs_dir = codec_run.parents[1]
    arguments = ("experiment=latent_diffusion/tiny_dit_flow", "trainer.num_images=16", f"runs_dir={runs_dir}")
    return train(compose_run(*arguments)).folder


def test_the_generators_average_leaves_the_frozen_codec_out(ldm_run):
    state = saved(ldm_run)
    raw, averaged = state["state_dict"], state["ema"]
    assert averaged.keys() == {name for name in raw if not name.startswith("model.codec.")}
    assert {name.split(".")[1] for name in averaged} == {"denoiser", "text"}


def test_a_generator_takes_the_newest_autoencoder_says_so_and_keeps_it(codec_run, ldm_run):
    assert run_folder.read_config(ldm_run)["builds_on"]["codec"] == str(codec_run)
    codec = load_file(codec_run / run_folder.FINAL_WEIGHTS)
    final = load_file(ldm_run / run_folder.FINAL_WEIGHTS)
    for name, value in codec.items():
        assert torch.equal(final[f"model.{name}"], value), name


def test_a_higher_resolution_goes_on_from_the_lower_one(ldm_run, compose_run, train, caplog):
    arguments = ["experiment=latent_diffusion/tiny_dit_flow", f"runs_dir={ldm_run.parents[1]}"]
    arguments += ["trainer.num_images=8", "resolution='64'"]
    caplog.set_level(logging.INFO, logger="t2i")
    first = compose_run(*arguments, "optimizer.learning_rate=1e-12", "ema=none")
    higher = train(first).folder
    assert f"continues the lower-resolution run {ldm_run}" in caplog.text
    assert run_folder.read_config(higher)["init_from"] == str(ldm_run)
    before, after = (load_file(folder / run_folder.FINAL_WEIGHTS) for folder in (ldm_run, higher))
    resized = {name for name, value in before.items() if after[name].shape != value.shape}
    parts = ("embed.weight", "out.weight", "out.bias", "refiner.features.weight", "refiner.features.bias")
    assert resized == {f"model.denoiser.{part}" for part in parts}  # patches are larger at 64 px
    for name, value in before.items():
        expected = value
        if name == "model.denoiser.embed.weight":
            expected = enlarge_patches(value.T, 2, 2).T / 4
        elif name in resized:
            expected = enlarge_patches(value, 2, 2)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-9)


def test_the_runs_of_one_process_have_folders_of_their_own(compose_run, train, tmp_path):
    arguments = (KL, "name=trial", "trainer.num_images=8", f"runs_dir={tmp_path}")
    folders = [train(compose_run(*arguments)).folder.name for _ in range(2)]
    assert folders == ["trial", "trial-2"]


def test_nothing_to_resume_or_to_build_on_is_one_sentence(compose_run, train, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"resume=latest found no run with a checkpoint in .*/autoencoder"
    ):
        train(compose_run(KL, f"runs_dir={tmp_path}", "resume=latest"))
    with pytest.raises(
        CheckpointError, match=r"builds on a codec, and there is none in .*/autoencoder: train one"
    ):
        train(compose_run("experiment=latent_diffusion/tiny_dit_flow", f"runs_dir={tmp_path}"))
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline_writes_into_the_run_folder(compose_run, train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    import wandb

    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = (
        KL,
        "logger=wandb_offline",
        "logger.tensorboard=false",
        "trainer.num_images=16",
        "name=trial",
    )
    folder = train(compose_run(*arguments, f"runs_dir={tmp_path / 'runs'}")).folder
    assert wandb.run is not None
    assert wandb.run.config["trainer.num_images"] == 16
    assert wandb.run.config["optimizer.learning_rate"] > 0
    wandb.finish()
    (run,) = (folder / "wandb").glob("offline-run-*-autoencoder-trial-*")
    deadline = time.monotonic() + 60  # wandb's own process writes when it comes to it
    while (size := sum(path.stat().st_size for path in run.glob("*.wandb"))) <= 1_000:
        assert time.monotonic() < deadline, f"{size} bytes"
        time.sleep(0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def records(path: Path) -> Iterator[bytes]:
    """Of a .wandb file, which is a log of LevelDB's behind a header of seven bytes: blocks of 32 KiB with chunks, each
    with checksum, length and kind (1: whole, 2: first, 3: middle, 4: last)."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def steps_at_wandb(part: Path) -> list[int]:
    """Those whose loss an offline part of a run has."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    (path,) = part.glob("*.wandb")
    for data in records(path):
        items = Record.FromString(data).history.item
        row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
        if "loss" in row:
            found.append(int(row["trainer/global_step"]))
    return found


def test_wandb_has_one_run_and_each_step_once_however_often_it_is_started(
    compose_run, train, tmp_path, monkeypatch
):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = (KL, "logger=wandb_offline", "logger.tensorboard=false", "name=trial", "resume=auto")
    arguments += ("trainer.batch_size=4", "trainer.log_every_steps=1", "trainer.checkpoint_every_images=8")
    parts: list[Path] = []
    for images in (16, 12, 24):
        config = compose_run(*arguments, f"trainer.num_images={images}", f"runs_dir={tmp_path / 'runs'}")
        folder = train(config).folder
        wandb.finish()
        parts += set((folder / "wandb").glob("offline-run-*")) - set(parts)
        for path in (folder / "checkpoints").glob("step_*"):  # as if it had died after the first checkpoint
            if path.name != "step_0000002":
                shutil.rmtree(path)
        (folder / "model.safetensors").unlink()
        time.sleep(1.1)  # wandb names its folders by the second
    ids = {path.name.split("-", 3)[3] for path in parts}
    assert len(parts) == 3
    assert len(ids) == 1
    assert [steps_at_wandb(part) for part in parts] == [[1, 2, 3, 4], [], [5, 6]]
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *"123456"]


def test_ctrl_c_saves_and_resuming_ends_where_the_whole_run_would(
    compose_run, train, shapes_overrides, tmp_path
):
    arguments = [KL, "ema=short", "trainer.num_images=800", "logger.tensorboard=false", "name=run"]
    stopped_dir = tmp_path / "stopped"
    folder = stopped_dir / "autoencoder" / "run"
    command = [sys.executable, "-m", "t2i_cli.main", "train"]
    command += [*shapes_overrides, *arguments, f"runs_dir={stopped_dir}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    )
    try:
        while process.poll() is None and len(rows(folder)) < 20:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    assert "Stopping after this step, to save" in printed
    assert "resume=latest" in printed.splitlines()[-1]
    summary = run_folder.read_summary(folder)
    assert summary["complete"] is False
    assert 160 <= summary["images_seen"] < 800
    assert not (folder / run_folder.FINAL_WEIGHTS).exists()
    loaded = checkpoint.load(run_folder.weights_file(folder))  # a stopped run can be used as it is
    assert "codec.latent_scale" in loaded.weights

    resumed = train(compose_run(*arguments, f"runs_dir={stopped_dir}", "resume=latest"))
    whole = train(compose_run(*arguments, f"runs_dir={tmp_path / 'whole'}"))
    assert resumed.folder == folder
    assert resumed.complete
    assert run_folder.read_summary(folder)["images_seen"] == 800
    ends = [load_file(run.folder / run_folder.FINAL_WEIGHTS) for run in (resumed, whole)]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(whole.folder)]


def rows(folder: Path) -> list[dict[str, str]]:
    """Those of metrics.csv, where there is one."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_count_epochs_and_bad_samples(compose_run, train, shapes_shards, tmp_path, caplog):
    """64 pictures, one of them broken: two epochs and a half have it twice or three times."""
    shard = next((shapes_shards / "train").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[content.index(b"\x89PNG")] = 0
    broken = tmp_path / "00000.tar"
    broken.write_bytes(content)
    config = compose_run(
        *(KL, "name=trial", f"runs_dir={tmp_path}", f"data.shards={broken}", "data.max_bad_share=0.1"),
        *("trainer.num_images=160", "trainer.log_every_steps=1", "logger.tensorboard=false"),
    )
    with caplog.at_level(logging.INFO, logger="t2i"):
        folder = train(config).folder
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [8 * step / 64 for step in range(1, 21)]
    bad = [int(float(row["bad_image"] or 0)) for row in rows]
    assert bad == sorted(bad)
    assert bad[7] == 1
    assert bad[15] == 2
    said = [record.getMessage() for record in caplog.records if "is over" in record.getMessage()]
    assert said == [f"epoch {n} is over; bad samples since the last report: 1 (image: 1)" for n in (1, 2)]
