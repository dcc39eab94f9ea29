"""Latent diffusion from one resolution to the next: what a run takes from the one before it, and what is its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2i.training import run_folder, state_folder

pytestmark = pytest.mark.slow  # a minute in all

SHARED = (
    *(
        "experiment=latent_diffusion/tiny_dit_flow",
        "optimizer.warmup_images=0",
        "resolution.min_original_px=0",
    ),
    *("trainer.num_images=24", "trainer.checkpoint_every_images=16", "trainer.keep_checkpoints=9"),
    *("ema.half_life_images=8", "ema.rampup_ratio=null", "trainer.precision=64-true", "name=run"),
)


@pytest.fixture(scope="module")
def ladder(tiny_kl, compose_run, train, tmp_path_factory) -> dict[int, Path]:
    """Three steps at 32, 64 and 128 px, with a newer codec from 64 px on."""
    runs_dir = tmp_path_factory.mktemp("ladder")
    shutil.copytree(tiny_kl, runs_dir / "autoencoder" / "first")
    folders = {}
    for size in (32, 64, 128):
        dropout = ["resolution.text_dropout=0.5"] if size == 32 else []
        typed = (*SHARED, f"name=at_{size}", f"resolution='{size}'", *dropout, f"runs_dir={runs_dir}")
        folders[size] = train(compose_run(*typed)).folder
        if size == 32:
            typed = (
                "experiment=autoencoder/tiny_kl",
                "trainer.num_images=16",
                "seed=1",
                f"runs_dir={runs_dir}",
            )
            train(compose_run(*typed))
    return folders


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / run_folder.FINAL_WEIGHTS)


def state(folder: Path, step: int) -> dict:
    return state_folder.read(folder / "checkpoints" / f"step_{step:07d}")


@pytest.mark.parametrize(("size", "before"), [(64, 32), (128, 64)])
def test_a_rung_keeps_the_codec_and_begins_to_count_anew(ladder, size, before):
    """The codec is the one of the run before, not the newest; text dropout is that of its own resolution."""
    config = run_folder.read_config(ladder[size])
    assert config["init_from"] == str(ladder[before])
    assert config["builds_on"] == run_folder.read_config(ladder[before])["builds_on"]
    assert Path(config["builds_on"]["codec"]).name == "first"
    assert config["resolution"]["text_dropout"] == 0.1
    first, last = state(ladder[size], 2), state(ladder[size], 3)
    assert (first["t2i"]["images_seen"], last["t2i"]["images_seen"]) == (16, 24)
    for optimizer, steps in ((first["optimizer_states"][0], 2), (last["optimizer_states"][0], 3)):
        assert max(int(each["step"]) for each in optimizer["state"].values() if "step" in each) == steps


def test_a_rung_without_steps_of_its_own_is_the_average_of_the_one_before(
    ladder, compose_run, train, tmp_path
):
    """At a rate of nothing; the raw weights are other ones. From 64 to 128 px patches stay what they were."""
    typed = (*SHARED, "resolution='128'", f"init_from={ladder[64]}", f"runs_dir={tmp_path}")
    still = train(compose_run(*typed, "optimizer.learning_rate=1e-30")).folder
    expected, found = final(ladder[64]), final(still)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.float().to(value)), (
            name
        )  # weights to start from are single precision
    raw = state(ladder[64], 3)["state_dict"]
    assert max(float((raw[name] - expected[name]).abs().max()) for name in raw if name in expected) > 1e-4


@pytest.mark.parametrize("size", [64, 128])
def test_resumed_in_the_middle_of_a_rung_it_ends_the_same_to_the_bit(
    ladder, size, compose_run, train, tmp_path
):
    """Also where the run before and the codecs are there no more."""
    folder = tmp_path / "ldm" / f"at_{size}"
    shutil.copytree(ladder[size], folder, ignore=shutil.ignore_patterns("step_0000003", "*.safetensors"))
    for path in ladder[size].glob("checkpoints/step_0000002/*"):
        shutil.copy(path, folder / "checkpoints" / "step_0000002")
    train(
        compose_run(*SHARED, f"name=at_{size}", f"resolution='{size}'", f"runs_dir={tmp_path}", "resume=auto")
    )
    expected, found = final(ladder[size]), final(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for name, value in state(ladder[size], 3)["state_dict"].items():
        assert torch.equal(state(folder, 3)["state_dict"][name], value), name
