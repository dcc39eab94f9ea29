"""What a scheduler's configuration says: the pictures of diffusers' pipeline with it are those of the converted run,
and of the run given back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from interop_models import generator_of, set_sampling
from torch import Tensor

from t2i.interfaces import SampleRequest
from t2i.interop.convert import Options, prepare, write
from t2i.interop.scheduler import CLASSES, read_scheduler
from t2i.training import run_folder

PUBLISHED = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def with_scheduler(source: Path, target: Path, **values: Any) -> Path:
    shutil.copytree(source, target)
    values = PUBLISHED | values
    (target / "scheduler/scheduler_config.json").write_text(json.dumps(values))
    index = json.loads((target / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", values["_class_name"]]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def draw_theirs(folder: Path, kind: str | None) -> Tensor:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    if kind is not None:
        pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red fox",
        height=32,
        width=32,
        num_inference_steps=9,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="pt",
    ).images


def draw_ours(run: Path, kind: str | None) -> Tensor:
    generator = generator_of(run)
    sampler = generator.sampling.sampler if kind is None else CLASSES[kind]
    set_sampling(generator, sampler=sampler, steps=9, guidance_scale=4.0)
    return generator.generate(SampleRequest(["a red fox"], [3], 32, 32)) / 2 + 0.5


@pytest.mark.parametrize(
    ("said", "kind", "changes_pictures"),
    [
        ({"timestep_spacing": "leading"}, "EulerDiscreteScheduler", True),
        ({"timestep_spacing": "trailing"}, "DDIMScheduler", True),
        ({"timestep_spacing": "linspace"}, "PNDMScheduler", True),
        ({"timestep_spacing": "leading", "steps_offset": 0}, "DPMSolverMultistepScheduler", True),
        ({"use_karras_sigmas": True}, "DPMSolverMultistepScheduler", True),
        ({"use_karras_sigmas": True}, "EulerDiscreteScheduler", True),
        ({"use_exponential_sigmas": True}, "EulerDiscreteScheduler", True),
        ({"final_sigmas_type": "sigma_min"}, "EulerDiscreteScheduler", False),
        ({"set_alpha_to_one": True}, "DDIMScheduler", False),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "DDIMScheduler", True),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, None, True),
        ({"_class_name": "HeunDiscreteScheduler"}, None, True),
        ({"_class_name": "UniPCMultistepScheduler"}, None, True),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, None, True),
        ({"prediction_type": "v_prediction"}, None, True),
        ({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, None, True),
    ],
    ids=str,
)
def test_pictures_are_those_of_diffusers(sd1_folder, tmp_path, said, kind, changes_pictures):
    source = with_scheduler(sd1_folder, tmp_path / "source", **said)
    expected = draw_theirs(source, kind)
    run, back = tmp_path / "run", tmp_path / "back"
    write(prepare(source, run, Options()))
    assert (draw_ours(run, kind) - expected).abs().max() < 1 / 255
    write(prepare(run, back, Options()))
    assert (draw_theirs(back, kind) - expected).abs().max() < 1 / 255
    if changes_pictures:
        plain = with_scheduler(sd1_folder, tmp_path / "plain")
        assert (draw_theirs(plain, kind) - expected).abs().max() > 1.5 / 255


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"algorithm_type": "dpmsolver"}, "algorithm_type is 'dpmsolver'"),
        ({"solver_order": 3}, "solver_order is 3"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas is True"),
        ({"interpolation_type": "log_linear"}, "interpolation_type is 'log_linear'"),
        ({"thresholding": 0}, "thresholding is 0"),
        ({"thresholding": True}, "thresholding is True"),
        ({"skip_prk_steps": False}, "skip_prk_steps is False"),
        ({"_class_name": "LMSDiscreteScheduler"}, "LMSDiscreteScheduler is no sampler of t2i's: ddim"),
        ({"made_up": 4}, "made_up (4) is not known"),
    ],
)
def test_what_cannot_be_taken_over_is_named(sd1_folder, tmp_path, said, words):
    source = with_scheduler(sd1_folder, tmp_path / "source", **said)
    notes = prepare(source, tmp_path / "run", Options()).parts.notes
    assert [note for note in notes if words in note and "scheduler_config.json" in note]


@pytest.mark.parametrize("kind", CLASSES)
def test_what_diffusers_itself_saves_is_all_known(kind, tmp_path):
    """Each class with its defaults, which are the published values where it matters."""
    options = {"skip_prk_steps": True} if kind == "PNDMScheduler" else {}
    getattr(diffusers, kind)(beta_schedule="scaled_linear", **options).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "scheduler_config.json").read_text())
    scheduler = read_scheduler(values, "x", stable_diffusion=True)
    assert scheduler.notes == []
    assert scheduler.sampling["sampler"] == CLASSES[kind]


def test_a_pipeline_sets_the_offset_itself_but_that_of_ldm_does_not():
    values = PUBLISHED | {"steps_offset": 0, "clip_sample": True, "_class_name": "DDIMScheduler"}
    assert read_scheduler(values, "x", stable_diffusion=True).sampling["steps_offset"] == 1
    ldm = read_scheduler(values, "x", stable_diffusion=False)
    assert ldm.sampling["steps_offset"] == 0
    assert [note for note in ldm.notes if "clip_sample is True" in note]


def test_a_single_file_says_what_it_has_no_place_for(sd1_folder, tmp_path, convert: Callable[..., Path]):
    run = convert(with_scheduler(sd1_folder, tmp_path / "source", timestep_spacing="trailing"), "run")
    assert run_folder.read_config(run)["sampling"]["timestep_spacing"] == "trailing"
    notes = prepare(run, tmp_path / "single.safetensors", Options()).parts.notes
    assert (
        "A single file has no place for how pictures are drawn: timestep_spacing=trailing is left out."
        in notes
    )
