"""Whole pipelines: the same prompt, seed and settings give the same pictures as diffusers, pixel for pixel."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from interop_models import generator_of, set_sampling
from torch import Tensor

from t2i.interfaces import SampleRequest
from t2i.interop.convert import Options, prepare, write

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
PUBLISHED = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PROMPTS, SEEDS = ["a red fox", "two green bottles on a wall"], [11, 12]
GUIDANCE = {"plain": (1.0, ""), "guided": (7.5, "blurry, low quality")}
SIZES = {"square": (32, 32), "wide": (32, 48)}
STRENGTH = 0.7


@pytest.fixture(scope="module")
def both(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small Stable Diffusion 1 (eps) or 2 (v) with the published scheduler's configuration: diffusers' pipeline,
    and ours from what was converted."""
    folder = tmp_path_factory.mktemp("pipelines") / "published"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "scheduler/scheduler_config.json"
    prediction = json.loads(path.read_text())["prediction_type"]
    path.write_text(json.dumps(PUBLISHED | {"prediction_type": prediction}))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    write(prepare(folder, folder.with_name("run"), Options()))
    return theirs, generator_of(folder.with_name("run"))


def draw_theirs(pipeline: Any, sampler: str, guidance: str, size: str, image: Tensor | None) -> Tensor:
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipeline.scheduler.config)
    parts = pipeline.components | {"scheduler": scheduler}
    kind = diffusers.StableDiffusionPipeline if image is None else diffusers.StableDiffusionImg2ImgPipeline
    running = kind(**parts, requires_safety_checker=False)
    running.set_progress_bar_config(disable=True)
    scale, negative = GUIDANCE[guidance]
    options: dict[str, Any] = {"image": image / 2 + 0.5, "strength": STRENGTH} if image is not None else {}
    if image is None:
        options["height"], options["width"] = SIZES[size]
    return running(
        PROMPTS,
        negative_prompt=[negative] * len(PROMPTS),
        num_inference_steps=10,
        guidance_scale=scale,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **options,
    ).images


def draw_ours(ours: Any, sampler: str, guidance: str, size: str, image: Tensor | None, rows: slice) -> Tensor:
    scale, negative = GUIDANCE[guidance]
    image = image if image is None else image[rows]
    set_sampling(ours, sampler=sampler, steps=10, guidance_scale=scale)
    return ours.generate(SampleRequest(PROMPTS[rows], SEEDS[rows], *SIZES[size], negative, image, STRENGTH))


def start_picture(size: str) -> Tensor:
    """(2, 3, H, W) in [-1, 1], smooth."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, SIZES[size], mode="bilinear") * 2 - 1


# Of each sampler; the others take minutes.
QUICK = {("guided", "wide", "txt2img"), ("plain", "square", "img2img")}
COMBINATIONS = [
    pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
    for each in itertools.product(GUIDANCE, SIZES, ("txt2img", "img2img"))
]


@pytest.mark.parametrize(("guidance", "size", "start"), COMBINATIONS)
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures_are_those_of_diffusers(both, sampler, guidance, size, start):
    theirs, ours = both
    image = start_picture(size) if start == "img2img" else None
    expected = draw_theirs(theirs, sampler, guidance, size, image)
    whole = draw_ours(ours, sampler, guidance, size, image, slice(0, 2))
    assert whole.shape == (2, 3, *SIZES[size])
    assert (whole / 2 + 0.5 - expected).abs().max() < 1 / 255
    # Alone, the second picture is the same one.
    alone = draw_ours(ours, sampler, guidance, size, image, slice(1, 2))
    torch.testing.assert_close(alone, whole[1:], atol=1e-3, rtol=0)


def test_pictures_depend_on_all_that_is_compared(both):
    """What the comparison above would be blind to where these pictures were alike."""
    image = start_picture("square")
    pictures = {
        (sampler, guidance, start is None): draw_ours(
            both[1], sampler, guidance, "square", start, slice(0, 1)
        )
        for sampler in SCHEDULERS
        for guidance in GUIDANCE
        for start in (None, image)
    }
    for first, second in itertools.combinations(pictures, 2):
        difference = ((pictures[first] - pictures[second]) / 2).abs().max()
        assert difference > 2 / 255, (first, second, difference)
