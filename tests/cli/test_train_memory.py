"""A GPU that is too small: what the plan says of the batch, and what would fit."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from t2i.planning.fits import bytes_of_batch, what_fits
from t2i.planning.model import build_model
from t2i.planning.plan import GIB, USABLE_MEMORY
from t2i_cli.composition import composed_run

LDM = ("experiment=latent_diffusion/tiny_dit_flow", "trainer.batch_size=64", "trainer.precision=bf16-mixed")


@pytest.fixture(scope="module")
def counted(compose_run):
    config = compose_run(*LDM)
    return config, build_model(config, {"codec": composed_run(["experiment=autoencoder/tiny_kl"])})


@pytest.mark.parametrize("fits", [0, 1, 17, 63])
def test_the_largest_batch_that_fits(counted, fits):
    config, model = counted
    usable = (bytes_of_batch(config, model, fits) + bytes_of_batch(config, model, fits + 1)) // 2
    said = what_fits(config, model, round(usable / USABLE_MEMORY))
    assert f"the plan counts {bytes_of_batch(config, model, 64) / GIB:.1f} GiB" in said
    assert (f"would fit, or at most trainer.batch_size={fits}." in said) == (fits > 0)
    assert ("not one picture would fit" in said) == (fits == 0)


@pytest.mark.parametrize(("fits", "parts"), [(1, 64), (5, 16), (15, 8)])
def test_a_batch_in_parts_takes_what_one_part_takes(counted, fits, parts):
    config, model = counted
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, micro_batches=4))
    usable = (bytes_of_batch(config, model, fits) + bytes_of_batch(config, model, fits + 1)) // 2
    said = what_fits(config, model, round(usable / USABLE_MEMORY))
    assert f"the plan counts {bytes_of_batch(config, model, 16) / GIB:.1f} GiB" in said
    assert f": trainer.micro_batches={parts} would fit, or at most trainer.batch_size={4 * fits}." in said
    assert "something else run on this GPU? Else try trainer.micro_batches=8." in what_fits(
        config, model, 10**12
    )


def test_where_nothing_or_all_would_fit(counted):
    config, model = counted
    assert "smaller model" in what_fits(config, model, 1000)
    assert "something else" in what_fits(config, model, 10**12)


@pytest.fixture(scope="module")
def codec(compose_run, train, tmp_path_factory):
    """For the generator to build on."""
    runs_dir = tmp_path_factory.mktemp("runs")
    arguments = ("experiment=autoencoder/tiny_kl", "trainer.num_images=8", f"runs_dir={runs_dir}")
    return train(compose_run(*arguments)).folder


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU of 8 MiB, which every run is too large for."""

    def too_large(*args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...\nmore"
        )

    monkeypatch.setattr("t2i.training.fit.fit", too_large)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = types.SimpleNamespace(total_memory=8 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


@pytest.mark.parametrize("found", ["named", "latest"])
def test_train_says_what_would_fit(t2i, codec, small_gpu, shapes_overrides, found):
    place = f"builds_on.codec={codec}" if found == "named" else f"runs_dir={codec.parents[1]}"
    sentence = t2i("train", *shapes_overrides, *LDM, place).sentence
    assert "trainer.batch_size=64 at 32 px with trainer.precision=bf16-mixed" in sentence
    assert "the plan counts" in sentence
    assert "would fit" in sentence


def test_a_family_that_builds_on_none(t2i, small_gpu, shapes_overrides):
    typed = ("experiment=autoencoder/tiny_vq", "trainer.batch_size=64")
    sentence = t2i("train", *shapes_overrides, *typed).sentence
    assert "trainer.batch_size=64 at 32 px" in sentence
    assert "the plan counts" in sentence
    assert "would fit" in sentence


def test_where_no_plan_can_be_made(t2i, small_gpu, shapes_overrides):
    sentence = t2i("train", *shapes_overrides, *LDM, "builds_on.codec=nowhere").sentence
    assert "trainer.batch_size=64 at 32 px" in sentence
    assert "try trainer.batch_size=32" in sentence
