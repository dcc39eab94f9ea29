"""The loss of held-out pictures at fixed times, and the weights that had the lowest."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from t2i.errors import ConfigError
from t2i.training import checkpoint
from t2i.training.randomness import Randomness
from t2i.training.validation import SEED, AtTime, Validation, validation_losses

PIXELS = (
    "experiment=pixel_diffusion/tiny_flow_dit",
    "name=run",
    "trainer.num_images=32",
    "trainer.log_every_steps=2",
)


def validations(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("validation_loss")]


def test_times_are_fixed_and_noise_belongs_to_the_picture():
    position = torch.tensor([5, 2])
    usual = Randomness(SEED, position, torch.float64)
    for number in range(8):
        drawn = AtTime(number, position, torch.float64)
        assert drawn.uniform("time").tolist() == [(number + 0.5) / 8] * 2
        assert torch.equal(drawn.normal("noise", 3), usual.normal("noise", 3))
        assert torch.equal(drawn.uniform("mask", 3), usual.uniform("mask", 3))


def test_the_loss_is_the_mean_over_the_pictures_at_each_time():
    def losses(turn, part, random):
        return {"loss": (random.uniform("time") * part.position).mean()}

    stage = SimpleNamespace(
        all_turns=[SimpleNamespace(name="denoiser")], losses=losses, weight_dtype=torch.float64
    )
    parts = [SimpleNamespace(position=torch.tensor(each)) for each in ([0, 1], [2, 3])]
    assert [float(each) for each in validation_losses(stage, parts)] == [
        1.5 * (k + 0.5) / 8 for k in range(8)
    ]


@pytest.fixture(scope="module")
def folders(compose_run, train, tmp_path_factory) -> tuple[Path, Path]:
    """Of the same run with and without validation."""
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for every in (16, 0):
        arguments = (f"trainer.validate_every_images={every}", f"runs_dir={folder}/{every}")
        made.append(train(compose_run(*PIXELS, *arguments)).folder)
    return made[0], made[1]


def test_it_is_logged_and_the_best_weights_are_kept(folders):
    folder, without = folders
    rows = validations(folder)
    assert [int(row["images"]) for row in rows] == [16, 32]
    for row in rows:
        by_time = [float(row[f"validation_loss_time_{number}"]) for number in range(8)]
        assert len(set(by_time)) == 8
        assert float(row["validation_loss"]) == pytest.approx(sum(by_time) / 8, rel=1e-5)
    lowest = min(rows, key=lambda row: float(row["validation_loss"]))
    best = folder / "best.safetensors"
    assert checkpoint.number_in_header(best, "validation_loss") == pytest.approx(
        float(lowest["validation_loss"])
    )
    assert checkpoint.images_seen(best) == int(lowest["images"])
    assert not (without / "best.safetensors").exists()
    assert validations(without) == []


def test_training_is_the_same_with_and_without(folders):
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_was_lowest_before_a_stop_still_counts(folders, compose_run, train):
    """A run that goes on from a checkpoint writes best.safetensors only where it is lower."""
    folder, _ = folders
    callback = Validation(folder, None)
    lowest = min(float(row["validation_loss"]) for row in validations(folder))
    assert callback.lowest == pytest.approx(lowest)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_process_has_its_share_in_parts_of_one_size(world, compose_run, tmp_path):
    from t2i.data.reader import read_all

    config = compose_run(*PIXELS, "trainer.batch_size=4")
    batch = read_all(config.data, config.data.heldout_shards, 32)
    stage = SimpleNamespace(config=config, device=torch.device("cpu"), weight_dtype=torch.float32)
    shares = [Validation(tmp_path, batch).parts(stage, rank, world) for rank in range(world)]
    assert len({tuple(len(part) for part in share) for share in shares}) == 1
    rows = [int(row) for share in shares for part in share for row in part.position]
    assert len(rows) == len(set(rows)) == len(batch) // (4 * world) * 4 * world


def test_what_cannot_be_validated_is_one_sentence(compose_run, train, tmp_path):
    every = ("trainer.validate_every_images=16", f"runs_dir={tmp_path}")
    with pytest.raises(ConfigError, match=r"validate_every_images is 16; allowed: 0 for stage=gan_int_cls"):
        train(compose_run("experiment=gan_int_cls/tiny_published", *every))
    with pytest.raises(ConfigError, match=r"allowed: 0 where data\.heldout_shards is null"):
        train(compose_run(*PIXELS, *every, "data.heldout_shards=null"))
    with pytest.raises(ConfigError, match=r"trainer\.validate_every_images is -1"):
        compose_run(*PIXELS, "trainer.validate_every_images=-1")
