"""`t2i train` that is stopped before its first step, or finds no place to write to."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

KL = ("experiment=autoencoder/tiny_kl", "logger.tensorboard=false", "name=run")


@pytest.mark.parametrize(
    "place",
    [
        "t2i.training.fit.preview_batch",
        "t2i.training.data.ShardData.train_dataloader",
        "t2i.training.callbacks.Forecast.on_train_start",
    ],
)
def test_ctrl_c_before_the_first_step(t2i, shapes_overrides, monkeypatch, place):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    handler = signal.getsignal(signal.SIGINT)
    outcome = t2i("train", *shapes_overrides, *KL)
    assert (outcome.code, outcome.err) == (130, "t2i train: stopped by Ctrl-C.\n")
    assert [path for path in Path().rglob("*") if path.is_file() or path.is_symlink()] == []
    assert not Path("runs/autoencoder/run").exists()
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_second_ctrl_c_ends_it_at_once(t2i, shapes_overrides, monkeypatch):
    from t2i.families.autoencoder.stage import Stage

    def interrupted(*args):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Stage, "losses", interrupted)
    outcome = t2i("train", *shapes_overrides, *KL)
    assert (outcome.code, outcome.err) == (130, "t2i train: stopped by Ctrl-C.\n")
    assert "Stopping after this step" in outcome.out
    assert not Path("runs/autoencoder/run").exists()


def test_a_parent_that_is_a_file(t2i, shapes_overrides):
    Path("file").write_text("")
    for runs_dir in ("file", "file/runs"):
        sentence = t2i("train", *shapes_overrides, *KL, f"runs_dir={runs_dir}").sentence
        assert sentence.startswith("t2i train: file")
        assert "cannot be used: " in sentence
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read(t2i, shapes_overrides):
    Path("readonly").mkdir(mode=0o555)
    sentence = t2i("train", *shapes_overrides, *KL, "runs_dir=readonly/runs").sentence
    assert sentence == "t2i train: readonly/runs/autoencoder cannot be used: Permission denied."


def test_a_full_disk_keeps_the_last_whole_checkpoint(tmp_path, shapes_overrides):
    """As a limit on the size of files, below that of the second checkpoint."""
    typed = [*shapes_overrides, *KL, "trainer.num_images=32", "trainer.checkpoint_every_images=8"]
    command = [sys.executable, "-m", "t2i_cli.main", "train", *typed]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, preexec_fn=limited
    )
    folder = Path("runs/autoencoder/run/checkpoints")
    assert result.returncode == 2, result.stderr
    assert f"{folder}/step_0000002 is not written: File too large; training goes on" in result.stdout
    (sentence,) = result.stderr.splitlines()
    assert sentence == f"t2i train: {folder}/step_0000004 cannot be used: File too large."
    assert list((tmp_path / folder).iterdir()) == []
