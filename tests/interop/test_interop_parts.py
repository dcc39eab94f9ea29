"""Models in parts: what a source lacks is said, and can be named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from interop_models import same_weights, save_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i.errors import UserError
from t2i.interop.convert import Options, prepare

STEM = "diffusion_pytorch_model"


def refused(source: Path, **options) -> str:
    with pytest.raises(UserError) as raised:
        prepare(source, source.parent / "out", Options(**options))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def without(weights: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(prefixes)}


VAE, TEXT, UNET = "first_stage_model.", "cond_stage_model.", "model.diffusion_model."


@pytest.fixture
def in_parts(sd1_single: Path, sd1_folder: Path, tmp_path: Path) -> Path:
    """The small Stable Diffusion 1 in the parts that people share."""
    folder = tmp_path / "parts"
    folder.mkdir()
    weights = load_file(sd1_single)
    save_file(without(weights, VAE), folder / "no_vae.safetensors")
    save_file(without(weights, TEXT), folder / "no_text.safetensors")
    save_file(without(weights, VAE, TEXT), folder / "unet.safetensors")
    bare = {name.removeprefix(UNET): value for name, value in without(weights, VAE, TEXT).items()}
    save_file(bare, folder / "bare.safetensors")
    vae = {n.removeprefix(VAE): v for n, v in weights.items() if n.startswith(VAE)}
    torch.save({"state_dict": vae}, folder / "vae.ckpt")
    text = {n.removeprefix(TEXT + "transformer."): v for n, v in weights.items() if n.startswith(TEXT)}
    save_file(text, folder / "clip_l.safetensors")
    shutil.copytree(sd1_folder, folder / "sd1")
    for name in ("vae", "text_encoder"):
        shutil.copytree(sd1_folder, folder / f"no_{name}")
        shutil.rmtree(folder / f"no_{name}" / name)
    shutil.copytree(sd1_folder / "unet", folder / "unet")
    return folder


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("no_vae.safetensors", {"vae": "vae.ckpt"}),
        ("no_vae.safetensors", {"vae": "sd1/vae"}),
        ("no_vae.safetensors", {"vae": "sd1"}),
        ("no_text.safetensors", {"text_model": "sd1/text_encoder"}),
        ("no_text.safetensors", {"text_model": "clip_l.safetensors"}),
        ("unet.safetensors", {"vae": "vae.ckpt", "text_model": "sd1"}),
        ("bare.safetensors", {"vae": "sd1", "text_model": "clip_l.safetensors"}),
        ("unet", {"vae": "sd1/vae", "text_model": "sd1/text_encoder"}),
        ("no_vae", {"vae": "vae.ckpt"}),
        ("no_text_encoder", {"text_model": "clip_l.safetensors"}),
    ],
    ids=str,
)
def test_missing_parts_can_be_named(in_parts, sd1_run, convert, source, options):
    run = convert(
        in_parts / source, "run", prediction="eps", **{k: str(in_parts / v) for k, v in options.items()}
    )
    assert same_weights(weights_of(run), weights_of(sd1_run))
    text = "text_encoder/model.safetensors"
    assert (run / text).read_bytes() == (sd1_run / text).read_bytes()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "no_vae.safetensors",
            "no_vae.safetensors has no autoencoder (first_stage_model.*); name one by --vae",
        ),
        ("unet.safetensors", "has no autoencoder"),
        ("no_text.safetensors", "has no text encoder (cond_stage_model.*); name one by --text"),
        ("bare.safetensors", "name one by --vae FILE or DIR"),
        ("unet", "has no autoencoder; name one by --vae FILE or DIR"),
        ("no_vae", "has no autoencoder (vae/); name one by --vae FILE or DIR"),
        ("no_text_encoder", "has no text encoder (text_encoder/); name one by --text DIR or FILE"),
        ("clip_l.safetensors", "holds a text encoder alone; give it by --text"),
        ("unet/diffusion_pytorch_model.safetensors", "give the folder in which its config.json lies"),
    ],
)
def test_missing_parts_are_said(in_parts, source, words):
    assert words in refused(in_parts / source)


def test_parts_that_do_not_fit_or_are_none(in_parts, tmp_path):
    vae = str(in_parts / "vae.ckpt")
    source = in_parts / "no_vae.safetensors"
    assert "absent does not exist" in refused(source, vae=str(in_parts / "absent"))
    assert "--text" in refused(in_parts / "no_text.safetensors", text_model=str(in_parts / "absent"))
    assert "--vae is" in refused(Path(vae), vae=vae)
    assert "no text encoder that is known" in refused(in_parts / "no_text.safetensors", text_model=vae)
    save_pipeline(tmp_path / "sd2", "sd2")
    sentence = refused(in_parts / "no_text.safetensors", text_model=str(tmp_path / "sd2"))
    assert "takes is 64; allowed: 128, as its text encoder has" in sentence


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (
            "run",
            {"prediction": "v"},
            "--prediction is 'v'; allowed: only with a source that t2i did not make",
        ),
        ("folder", {"prediction": "v"}, "--prediction is 'v'; allowed: eps, as"),
        ("codec", {"prediction": "v"}, "--prediction is 'v'; allowed: only with a source that has a UNet"),
        (
            "codec run",
            {"text_model": "x"},
            "--text is 'x'; allowed: only with a source that has a text encoder",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 10 else "",
)
def test_a_flag_that_would_do_nothing_is_refused(
    sd1_folder, sd1_run, convert, tmp_path, source, options, words
):
    places = {"run": sd1_run, "folder": sd1_folder, "codec": sd1_folder / "vae"}
    place = places[source] if source in places else convert(sd1_folder / "vae", "codec")
    with pytest.raises(UserError) as raised:
        prepare(place, tmp_path / "out", Options(**options))
    assert words in str(raised.value)
