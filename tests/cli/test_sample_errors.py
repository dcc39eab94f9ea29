"""A wrong `t2i sample` or `t2i report` ends with 2 and one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

PROMPT = ("sample", "--prompt", "a red circle")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("runs/ldm", "no trained run", "--checkpoint")),
        (("--runs-dir", "elsewhere"), ("elsewhere/ldm",)),
        (("--checkpoint", "absent"), ("absent", "does not exist")),
        (("--checkpoint", "absent.safetensors"), ("absent.safetensors", "does not exist")),
        (("--checkpoint", "."), ("holds no checkpoint",)),
        (("nonsense",), ("'nonsense'", "key=value")),
        (("--colour=red",), ("'--colour=red'", "flag")),
        (("--steps", "0"), ("--steps", "0", "1 or more")),
        (("--num-images", "0"), ("--num-images", "1 or more")),
        (("--batch-size", "-1"), ("--batch-size", "-1", "1 or more")),
        (("--height", "0"), ("--height", "1 or more")),
        (("--image", "absent.png"), ("--image", "absent.png", "exists")),
        (("--strength", "0.5"), ("--strength", "0.5", "only with --image")),
        (("--image", "absent.png", "--strength", "0"), ("--image",)),
    ],
    ids=str,
)
def test_one_sentence(t2i, arguments, words):
    sentence = t2i(*PROMPT, *arguments).sentence
    assert sentence.startswith("t2i sample: ")
    for word in words:
        assert word in sentence
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["sample"], "--prompt"), ([*PROMPT, "--seed", "one"], "--seed"), (["report", "x"], "x")],
)
def test_argparse_names_the_flag(t2i, arguments, word):
    result = t2i(*arguments)
    assert result.code == 2
    assert word in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def foreign_files(folder: Path) -> dict[str, Path]:
    """What people have lying about."""
    paths = {name: folder / name for name in ("text.ckpt", "pickle.ckpt", "other.ckpt", "short.ckpt")}
    paths["text.ckpt"].write_text("not a checkpoint")
    torch.save(Evil(), paths["pickle.ckpt"])
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, paths["other.ckpt"])
    paths["short.ckpt"].write_bytes(paths["other.ckpt"].read_bytes()[:200])
    paths |= {name: folder / name for name in ("other.safetensors", "text.safetensors")}
    save_file({"weight": torch.zeros(2)}, paths["other.safetensors"])
    paths["text.safetensors"].write_text("not a checkpoint")
    return paths


@pytest.mark.parametrize(
    "name", ["text.ckpt", "pickle.ckpt", "other.ckpt", "short.ckpt", "other.safetensors", "text.safetensors"]
)
def test_a_foreign_checkpoint(t2i, tmp_path, name):
    path = foreign_files(tmp_path)[name]
    assert name in t2i(*PROMPT, "--checkpoint", str(path)).sentence
    assert not Path("ran-code").exists()


def composed(*overrides: str) -> dict:
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("t2i_conf", version_base="1.3"):
        return OmegaConf.to_container(compose("train", ["data=shapes", *overrides]), resolve=True)


def write(path: Path, weights: dict[str, torch.Tensor], config: dict, extra: dict | None = None) -> str:
    save_file(weights, path, metadata={"t2i": json.dumps({"config": config, "extra": extra or {}})})
    return str(path)


def autoencoder_checkpoint(path: Path, **changes) -> str:
    return write(path, {"weight": torch.zeros(2)}, composed("stage=autoencoder") | changes)


@pytest.fixture(scope="module")
def ldm_file(tmp_path_factory) -> str:
    """A latent diffusion model at its random start, as its final weights file."""
    from t2i.config import parse_run
    from t2i.families.latent_diffusion.config import Config
    from t2i.families.latent_diffusion.stage import build_model

    codec = composed("stage=autoencoder", "backbone.width=32", "backbone.depth=1")
    values = composed(
        "stage=ldm", "text=learned", "denoiser.width=32", "denoiser.depth=1", "sampling.steps=2"
    )
    torch.manual_seed(0)
    model = build_model(parse_run(values, Config).model, codec)
    weights = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    return write(tmp_path_factory.mktemp("ldm") / "ldm.safetensors", weights, values, {"codec": codec})


def test_an_autoencoder_draws_nothing_for_prompts(t2i, tmp_path):
    path = autoencoder_checkpoint(tmp_path / "model.safetensors")
    sentence = t2i(*PROMPT, "--checkpoint", path).sentence
    assert "model.safetensors" in sentence
    assert "autoencoder" in sentence


def test_a_checkpoint_cannot_name_code_to_import(t2i, tmp_path):
    Path("evil.py").write_text("from pathlib import Path\nPath('ran-code').touch()\n")
    path = autoencoder_checkpoint(tmp_path / "model.safetensors", family="...evil")
    assert "'...evil'" in t2i(*PROMPT, "--checkpoint", path).sentence
    assert not Path("ran-code").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("text=[1", ("text=[1", "key=value")),
        ("text=5", ("text", "5", "mapping")),
        ("text.modle=x", ("text.modle", "text.model?")),
        ("sampling.steps=0", ("sampling.steps", "1 or more")),
        ("nothing=1", ("nothing", "not a known key")),
        ("family=gan", ("family", "'gan'", "latent_diffusion")),
    ],
)
def test_a_bad_override(t2i, ldm_file, override, words):
    sentence = t2i(*PROMPT, "--checkpoint", ldm_file, override).sentence
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--height", "50"), ("height", "50", "multiples of 8")),
        (("--width", "33"), ("width", "33", "multiples of 8")),
        (("--sampler", "magic"), ("magic", "euler")),
    ],
)
def test_what_the_model_cannot_draw(t2i, ldm_file, arguments, words):
    sentence = t2i(*PROMPT, "--checkpoint", ldm_file, *arguments).sentence
    for word in words:
        assert word in sentence


def test_what_cannot_be_started_from(t2i, ldm_file, tmp_path):
    def sentence(picture, *arguments):
        return t2i(*PROMPT, "--checkpoint", ldm_file, "--image", picture, *arguments).sentence

    (tmp_path / "notes.txt").write_text("not a picture")
    assert "notes.txt is not a picture" in sentence(str(tmp_path / "notes.txt"))
    Image.new("RGB", (40, 30)).save(tmp_path / "start.png")
    assert "strength is 0.01" in sentence(str(tmp_path / "start.png"), "--strength", "0.01")
    assert "--strength" in sentence(str(tmp_path / "start.png"), "--strength", "1.5")


def test_a_picture_to_start_from(t2i, ldm_file, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "start.png")
    start = ("--image", str(tmp_path / "start.png"), "--num-images", "1")
    for strength in ("0.5", "1"):
        assert t2i(*PROMPT, "--checkpoint", ldm_file, *start, "--strength", strength).code == 0
    assert len({path.read_bytes() for path in Path("samples").iterdir()}) == 2


def test_pictures_are_written(t2i, ldm_file):
    """The same file without a mistake draws."""
    result = t2i(*PROMPT, "--checkpoint", ldm_file, "--num-images", "2", "--steps", "1", "--width", "40")
    assert (result.code, result.err) == (0, "")
    names = sorted(path.name for path in Path("samples").iterdir())
    assert names == ["a-red-circle_0.png", "a-red-circle_1.png", "grid.png"]
    for name in names:
        assert f"samples/{name}" in result.out


def test_a_report_without_runs(t2i):
    assert "runs/ldm" in t2i("report").sentence


def test_a_report_on_no_run(t2i):
    assert "nowhere" in t2i("report", "--checkpoint", "nowhere").sentence
