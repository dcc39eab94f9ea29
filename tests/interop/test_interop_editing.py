"""Whole pipelines that start from a picture: the same pictures as diffusers, in float64 on shared random weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from interop_models import generator_of, set_sampling
from torch import Tensor

from t2i.interfaces import SampleRequest
from t2i.interop.convert import Options, prepare, write
from t2i.nn.precision import mixed

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
EXTRA: dict[str, dict[str, bool]] = {name: {} for name in SCHEDULERS} | {"pndm": {"skip_prk_steps": True}}
PROMPTS, SEEDS, SIZE, NEGATIVE = ["a red fox", "two green bottles"], [11, 12], (32, 32), "blurry"
TOLERANCE = 1e-5  # diffusers keeps its schedules' tables in float32


def double_pair(folder: Path, run: Path) -> tuple[Any, Any]:
    """diffusers' pipeline and our generator of the same weights, in float64."""
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder).to(torch.float64)
    write(prepare(folder, run, Options()))
    ours = generator_of(run)
    ours.model.double()
    ours.model.text.to("cpu", torch.float64)
    ours.precision = "64-true"
    return theirs, ours


@pytest.fixture(scope="module")
def both(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return double_pair(sd1_folder, tmp_path_factory.mktemp("editing") / "run")


@pytest.fixture(autouse=True)
def doubles(float64: None) -> None:
    """All that is made here is float64, but for what is loaded before."""


def picture() -> Tensor:
    """(2, 3, H, W) in [-1, 1], smooth."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear") * 2 - 1


def mask() -> Tensor:
    """(2, 1, H, W) of whole latent positions."""
    made = torch.zeros(2, 1, *SIZE)
    made[0, :, 8:24, 8:32] = 1
    made[1, :, :, :16] = 1
    return made


def draw_theirs(
    pipeline: Any, kind: Any, sampler: str, strength: float, masked: bool, **options: Any
) -> Tensor:
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(
        pipeline.scheduler.config, **EXTRA[sampler]
    )
    running = kind(**pipeline.components | {"scheduler": scheduler}, requires_safety_checker=False)
    running.set_progress_bar_config(disable=True)
    options |= {"mask_image": mask()} if masked else {}
    return running(
        PROMPTS,
        image=picture(),
        strength=strength,
        negative_prompt=[NEGATIVE] * 2,
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **({"height": SIZE[0], "width": SIZE[1]} if masked else {}),
        **options,
    ).images


def draw_ours(ours: Any, sampler: str, **changes: Any) -> Tensor:
    set_sampling(ours, sampler=sampler, steps=6, guidance_scale=3.0)
    request = SampleRequest(PROMPTS, SEEDS, *SIZE, NEGATIVE, picture(), **changes)
    with mixed("64-true", torch.device("cpu")):
        return ours.model.generate(request, ours.sampling)


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_pictures_to_pictures_are_those_of_diffusers(both, sampler, strength):
    theirs, ours = both
    kind = diffusers.StableDiffusionImg2ImgPipeline
    expected = draw_theirs(theirs, kind, sampler, strength, False)
    found = draw_ours(ours, sampler, strength=strength) / 2 + 0.5
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_inpainted_pictures_are_those_of_diffusers(both, sampler, strength):
    """Whose kept pixels have been through the codec: ours are those of the picture itself."""
    theirs, ours = both
    kind = diffusers.StableDiffusionInpaintPipeline
    options = {
        "masked_image_latents": torch.zeros(2, 4, SIZE[0] // 4, SIZE[1] // 4)
    }  # not drawn for, not used
    expected = draw_theirs(theirs, kind, sampler, strength, True, **options)
    found = draw_ours(ours, sampler, strength=strength, mask=mask())
    drawn = mask().bool().expand(-1, 3, -1, -1)
    assert (found / 2 + 0.5 - expected)[drawn].abs().max() < TOLERANCE
    assert torch.equal(found[~drawn], picture()[~drawn])


def test_what_is_compared_differs(both):
    pictures = [
        draw_ours(both[1], sampler, strength=strength, mask=chosen)
        for sampler in ("ddim", "pndm", "dpmpp_2m")
        for strength in (0.6, 1.0)
        for chosen in (None, mask())
    ]
    for first, second in itertools.combinations(pictures, 2):
        assert (first - second).abs().max() > 1e-3
