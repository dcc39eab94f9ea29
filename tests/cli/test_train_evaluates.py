"""`t2i train trainer.evaluate_every_images=N`: what is drawn while training is measured."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from t2i.data.reader import read_all
from t2i.errors import ConfigError
from t2i.evaluation.drawn import DrawnFigures
from t2i_cli.train import drawn_measure


def test_pictures_drawn_while_training_are_measured(t2i, shapes_overrides):
    small = (
        "experiment=gan_int_cls/tiny_published",
        "trainer.num_images=16",
        "name=run",
        "logger.tensorboard=false",
    )
    done = t2i("train", *small, *shapes_overrides, "trainer.evaluate_every_images=8")
    assert done.code == 0, done
    with Path("runs/gan_int_cls/run/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("drawn_exact")]
    assert [int(row["images"]) for row in rows] == [8, 16]
    assert all(0 <= float(row["drawn_exact"]) <= float(row["drawn_background"]) <= 1 for row in rows)
    assert all(float(row["drawn_fd_efficientnet"]) > 0 for row in rows)


def test_real_pictures_are_right_and_at_no_distance(compose_run):
    config = compose_run("experiment=gan_int_cls/tiny_published")
    heldout = read_all(config.data, config.data.heldout_shards, 32)
    measure = DrawnFigures(heldout, lambda: heldout)
    found = measure(heldout.image)
    assert found["drawn_exact"] >= 0.9
    assert found["drawn_fd_efficientnet"] == pytest.approx(0, abs=1e-3)
    assert measure(torch.zeros_like(heldout.image))["drawn_fd_efficientnet"] > 1


def test_a_stage_that_draws_nothing_is_one_sentence(t2i, shapes_overrides):
    said = t2i(
        "train", "experiment=autoencoder/tiny_kl", *shapes_overrides, "trainer.evaluate_every_images=8"
    ).sentence
    assert "trainer.evaluate_every_images is 8; allowed: 0 for stage=autoencoder, which draws nothing" in said


def test_one_picture_that_is_held_out_is_one_sentence(compose_run, monkeypatch):
    """A distance to it would be that of a covariance which there is not."""
    monkeypatch.setattr("t2i.data.reader.read_all", lambda *given, **more: read_all(*given[:3], limit=1))
    config = compose_run("experiment=gan_int_cls/tiny_published", "trainer.evaluate_every_images=8")
    with pytest.raises(
        ConfigError, match=r"evaluate_every_images is 8; allowed: 0 where .* hold one picture"
    ):
        drawn_measure(config)
