"""Single steps: seeds of any size, clipping, parameters that wait, and what is measured of a step."""

from __future__ import annotations

import csv
import types
from pathlib import Path

import pytest
import torch

from t2i.interfaces import TextFeatures
from t2i.text.cache import CachedTextEncoder
from t2i.training import callbacks, run_folder, state_folder
from t2i.training.callbacks import Forecast

KL = ("experiment=autoencoder/tiny_kl", "name=run")


def losses(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row["loss"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("seed", [281_469_838, 2**32, 2**63, 2**64 + 5, 10**30])
def test_any_seed_trains_and_resumes(compose_run, train, tmp_path, seed):
    arguments = (*KL, f"seed={seed}", "trainer.num_images=24")
    first = train(compose_run(*arguments, f"runs_dir={tmp_path / 'a'}")).folder
    assert losses(train(compose_run(*arguments, f"runs_dir={tmp_path / 'b'}")).folder) == losses(first)
    longer = (*arguments[:-1], "trainer.num_images=32", "resume=latest")
    assert train(compose_run(*longer, f"runs_dir={tmp_path / 'a'}")).images_seen == 32


def test_the_discriminators_first_step_is_as_large_as_any_optimizers_first(compose_run, train, tmp_path):
    """Adam's (1412.6980): the learning rate for each parameter, whatever its gradient."""
    arguments = ("adversarial.start_images=24", "optimizer.warmup_images=0", "optimizer.schedule=constant")
    arguments += ("trainer.checkpoint_every_images=8", "trainer.keep_checkpoints=9", "trainer.num_images=32")
    arguments += ("optimizer.weight_decay=0.3", "optimizer.gradient_clip=0", "optimizer.learning_rate=0.001")
    folder = train(compose_run(*KL, *arguments, f"runs_dir={tmp_path}")).folder
    saved = [state_folder.weights(path)[0] for path in run_folder.checkpoints(folder)]
    names = [name for name in saved[0] if name.startswith("discriminator.")]
    for name in names:  # not decayed either
        assert torch.equal(saved[0][name], saved[2][name])
    name = next(name for name in names if name.endswith("weight") and saved[0][name].ndim == 4)
    moved = saved[3][name] - saved[2][name] * (1 - 0.001 * 0.3)
    assert moved.abs().median().item() == pytest.approx(0.001, rel=1e-3)


def test_nothing_is_multiplied_where_nothing_is_clipped(compose_run, train, tmp_path, monkeypatch):
    clipped = []
    multiply = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *args: clipped.append(1) or multiply(*args))
    for limit, expected in ((0, 0), (1, 2)):
        arguments = (f"optimizer.gradient_clip={limit}", "trainer.num_images=16", f"runs_dir={tmp_path}")
        folder = train(compose_run(*KL, *arguments)).folder
        assert len(clipped) == expected
        with (folder / "metrics.csv").open(newline="") as file:
            assert all(float(row["gradient_norm"]) > 0 for row in csv.DictReader(file))


class Clock:
    """One that moves only where it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(callbacks.time, "perf_counter", made)
    return made


def a_stage(device: str, batch_size: int, steps: int, text: CachedTextEncoder | None = None):
    settings = types.SimpleNamespace(num_images=batch_size * steps)
    config = types.SimpleNamespace(trainer=settings, resolution=types.SimpleNamespace(size_px=64))
    return types.SimpleNamespace(
        config=config, images_seen=0, images_per_step=batch_size, is_complete=False, cached_text=text,
        device=torch.device(device),
    )  # fmt: skip


def test_the_forecast_waits_for_the_work_of_a_gpu(monkeypatch, caplog, clock):
    """3 s a step, seen by who waits for it."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.wait(3.0))
    stage, forecast = a_stage("cuda:0", 8, 100), Forecast()
    with caplog.at_level("INFO", logger="t2i"):
        forecast.on_train_start(None, stage)
        forecast.on_train_batch_end(None, stage, None, None, 0)
    assert "about 5 minutes at 3.0 s a step" in caplog.text


@pytest.mark.parametrize(
    ("steps", "said"), [(10, []), (12, ["about 6 seconds at 3.0 s a step; Ctrl-C saves and stops"])]
)
def test_a_run_that_is_over_by_then_has_no_forecast(caplog, clock, steps, said):
    stage, forecast = a_stage("cpu", 8, steps), Forecast()
    with caplog.at_level("INFO", logger="t2i"):
        forecast.on_train_start(None, stage)
        for step in range(10):
            clock.wait(0.1 if step < 5 else 3.0)
            stage.images_seen += 8
            forecast.on_train_batch_end(None, stage, None, None, step)
    assert caplog.messages[1:] == said


class SlowEncoder:
    """A quarter of a second for each caption."""

    trainable, token_dim, pooled_dim, max_tokens = False, 2, 3, 4

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, captions):
        self.clock.wait(0.25 * len(captions))
        count = len(captions)
        return TextFeatures(torch.zeros(count, 4, 2), torch.zeros(count, 3), torch.ones(count, 4).bool())


@pytest.mark.parametrize(("room", "left_s", "step_s"), [(80, 35, 0.7), (40, 75, 1.5)])
def test_the_forecast_counts_what_is_encoded_once(caplog, clock, room, left_s, step_s):
    """80 captions in batches of 4 are there after 20 of 60 steps, if there is room for them all; a step takes half a
    second beside their one."""
    text = CachedTextEncoder(SlowEncoder(clock), max_bytes=room * 4 * (4 * 2 + 3 + 1))
    stage, forecast = a_stage("cpu", 4, 60, text), Forecast()
    trainer = types.SimpleNamespace(train_dataloader=types.SimpleNamespace(num_samples=80))
    with caplog.at_level("INFO", logger="t2i"):
        forecast.on_train_start(trainer, stage)
        for step in range(60):
            captions = [f"caption {(4 * step + i) % 80}" for i in range(4)]
            text(captions)
            clock.wait(0.5)
            stage.images_seen += 4
            forecast.on_train_batch_end(trainer, stage, None, captions, step)
            if step == 9:
                said_at = clock.now
    assert clock.now - said_at == left_s
    assert f"about {left_s} seconds at {step_s} s a step" in caplog.text
