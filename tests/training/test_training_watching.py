"""What metrics.csv and the bar say beside losses: waits for data, MFU, loss by time."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from t2i import families
from t2i.data.loader import CaptionedImages
from t2i.training.callbacks import mean_over_processes, told
from t2i.training.fit import fit

KL = ("experiment=autoencoder/tiny_kl", "name=run", "trainer.log_every_steps=2")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_share_of_the_time_in_which_steps_wait_for_data(compose_run, train, tmp_path, monkeypatch):
    """By a clock that moves 3 s while a batch is made and 1 s in a step."""
    now = [0.0]
    made = CaptionedImages.__getitem__

    def slow(self, slots):
        now[0] += 3.0
        return made(self, slots)

    stage = families.get("autoencoder").load_stage("autoencoder")
    step = stage.training_step

    def stepped(self, *args):
        now[0] += 1.0
        return step(self, *args)

    monkeypatch.setattr(CaptionedImages, "__getitem__", slow)
    monkeypatch.setattr(stage, "training_step", stepped)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    arguments = ("data.num_workers=0", "trainer.num_images=48", f"runs_dir={tmp_path}")
    found = rows(train(compose_run(*KL, *arguments)).folder)
    assert [float(row["data_wait"]) for row in found] == pytest.approx([0.75] * 3)
    assert [float(row["images_per_second"]) for row in found] == pytest.approx([2.0] * 3)
    assert not {"mfu", "peak_memory_gib"} & found[0].keys()  # of GPUs alone


def test_mfu_is_the_rate_times_what_one_picture_per_second_means(compose_run, tmp_path):
    config = compose_run(*KL, "trainer.num_images=32", f"runs_dir={tmp_path}")
    stage_class = families.get(config.family).load_stage(config.stage)
    found = rows(fit(config, stage_class, Console(quiet=True), mfu_per_rate=1e-3).folder)
    assert len(found) == 2
    for row in found:
        assert float(row["mfu"]) == pytest.approx(1e-3 * float(row["images_per_second"]))


@pytest.fixture(scope="module")
def codec(compose_run, train, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(compose_run(*KL, "trainer.num_images=16", f"runs_dir={folder}")).folder


@pytest.mark.parametrize(
    "name",
    [
        "pixel_diffusion/tiny_flow_dit",
        "pixel_diffusion/tiny_cosine_learned",
        "latent_diffusion/tiny_unet_eps",
    ],
)
def test_a_loss_is_that_of_its_quarter_of_the_time(name, compose_run, train, codec, tmp_path):
    """With one picture a step each row has one, which is the loss."""
    arguments = ["trainer.batch_size=1", "trainer.log_every_steps=1", "trainer.num_images=12"]
    if name.startswith("latent"):
        arguments.append(f"builds_on.codec={codec}")
    found = rows(train(compose_run(f"experiment={name}", *arguments, f"runs_dir={tmp_path}")).folder)
    quarters = [name for name in found[0] if name.startswith("loss_time")]
    assert len(quarters) >= 2
    for row in found:
        assert [row[name] for name in quarters if row[name]] == [row["loss"]]


def test_sums_with_counts_are_means_over_all_and_left_out_where_there_is_none():
    values = {
        "loss": torch.tensor(2.0),
        "some": torch.tensor([3.0, 4.0]),
        "none": torch.tensor([0.0, 0.0]),
    }
    assert mean_over_processes(values) == {"loss": 2.0, "some": 0.75}


def test_what_the_bar_says():
    assert told({}) == ""
    latest = {"data_wait": 0.034, "loss": 0.12345, "loss_time_0_25": 1.0, "gradient_norm": 0.5}
    assert told(latest) == "loss 0.1235, gradient 0.5, waits for data 3%"
    latest |= {"mfu": 0.413, "peak_memory_gib": 61.25}
    assert told(latest) == "loss 0.1235, gradient 0.5, MFU 41.3%, waits for data 3%, 61.2 GiB"
