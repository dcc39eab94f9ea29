"""Inpainting UNets with 9 input channels: converted both ways, and the pictures of diffusers; and models that are named
as what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from interop_models import all_weights, generator_of, same_weights, save_pipeline, set_sampling
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i.errors import CheckpointError
from t2i.interfaces import SampleRequest
from t2i.interop.convert import Options, prepare, write
from t2i.nn.precision import mixed

PROMPTS, SEEDS, SIZE = ["a red fox", "two green bottles"], [11, 12], (32, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 1 for inpainting as diffusers saves it."""
    made = tmp_path_factory.mktemp("inpainting") / "theirs"
    save_pipeline(made, "sd1", in_channels=9)
    index = made / "model_index.json"
    values = json.loads(index.read_text()) | {"_class_name": "StableDiffusionInpaintPipeline"}
    index.write_text(json.dumps(values))
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    write(prepare(folder, folder.with_name("run"), Options()))
    return folder.with_name("run")


def test_every_form_holds_the_same_weights(
    folder: Path, run: Path, convert: Callable[..., Path], tmp_path: Path
) -> None:
    back = convert(run, "back")
    assert json.loads((back / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionInpaintPipeline"
    )
    assert json.loads((back / "unet/config.json").read_text())["in_channels"] == 9
    theirs, ours = all_weights(folder), all_weights(back)
    for name in theirs:
        assert same_weights(theirs[name], ours[name]), name
    single = convert(run, "single.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert load_file(single)[name].shape == (32, 9, 3, 3)
    again = convert(single, "again")
    assert same_weights(load_file(again / "model.safetensors"), load_file(run / "model.safetensors"))


def picture_and_mask() -> tuple[Tensor, Tensor]:
    """(2, 3, H, W) in [-1, 1], smooth, and (2, 1, H, W) that follows no grid."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, *SIZE)
    mask[0, :, 7:22, 10:31], mask[1, :, :, :15] = 1, 1
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear") * 2 - 1, mask


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_pictures_are_those_of_diffusers(folder: Path, run: Path, strength: float) -> None:
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder).to(torch.float64)
    ours: Any = generator_of(run)
    ours.model.double()
    ours.model.text.to("cpu", torch.float64)
    set_sampling(ours, sampler="ddim", steps=6, guidance_scale=3.0)
    image, mask = picture_and_mask()
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPTS,
        image=image,
        mask_image=mask,
        strength=strength,
        negative_prompt=["blurry"] * 2,
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        height=SIZE[0],
        width=SIZE[1],
    ).images
    with mixed("64-true", torch.device("cpu")):
        request = SampleRequest(PROMPTS, SEEDS, *SIZE, "blurry", image, strength, mask)
        found = ours.model.generate(request, ours.sampling)
        whole = ours.model.generate(SampleRequest(PROMPTS, SEEDS, *SIZE), ours.sampling)
    drawn = mask.bool().expand(-1, 3, -1, -1)
    assert (found / 2 + 0.5 - expected)[drawn].abs().max() < 1e-5
    assert torch.equal(found[~drawn], image[~drawn])
    assert (whole - found)[drawn].abs().max() > 1e-2  # without a picture all is drawn


DEPTH = r"is a depth-to-image model \(a depth map beside the latent: 5 channels\), which is not supported"


def test_a_depth_model_is_named(tmp_path: Path, sd1_run: Path, convert: Callable[..., Path]) -> None:
    save_pipeline(tmp_path / "depth", "sd1", in_channels=5)
    with pytest.raises(CheckpointError, match=DEPTH):
        prepare(tmp_path / "depth", tmp_path / "out", Options())
    weights = load_file(convert(sd1_run, "single.safetensors"))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    weights[name] = torch.zeros(32, 5, 3, 3)
    save_file(weights, tmp_path / "depth.safetensors")
    with pytest.raises(CheckpointError, match=DEPTH):
        prepare(tmp_path / "depth.safetensors", tmp_path / "out", Options())


@pytest.mark.parametrize(
    ("pipeline", "named"),
    [
        ("StableDiffusionDepth2ImgPipeline", "a depth-to-image model"),
        ("StableDiffusionUpscalePipeline", "a x4 upscaler"),
    ],
)
def test_pipelines_that_are_not_supported_are_named(tmp_path: Path, pipeline: str, named: str) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(CheckpointError, match=rf"theirs is {named} \({pipeline}\), which is not supported"):
        prepare(tmp_path / "theirs", tmp_path / "out", Options())


def test_an_upscalers_unet_is_named(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "theirs", "sd1", in_channels=7)
    config = tmp_path / "theirs/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_class_embeds": 1000}))
    with pytest.raises(CheckpointError, match=r"is a x4 upscaler \(a picture of low resolution beside"):
        prepare(tmp_path / "theirs", tmp_path / "out", Options())
