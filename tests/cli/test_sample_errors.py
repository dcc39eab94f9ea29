"""A wrong `t2i sample` or `t2i report` ends with 2 and one sentence."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weight_files import composed, write

PROMPT = ("sample", "--prompt", "a red circle")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("runs/ldm", "no trained run", "--checkpoint")),
        (("--runs-dir", "elsewhere"), ("elsewhere/ldm",)),
        (("--checkpoint", "absent"), ("absent", "does not exist")),
        (("--checkpoint", ""), ("--checkpoint is ''",)),
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
        (("--guidance-scale", "nan"), ("--guidance-scale", "nan", "0 or more")),
        (("--guidance-scale", "1e39"), ("--guidance-scale", "1e+39", "0 to 1e+30")),
        (("--guidance-scale", "inf"), ("--guidance-scale", "inf")),
        (("--guidance-scale", "-1"), ("--guidance-scale", "-1")),
        (("--seed", "-1"), ("--seed", "-1", "0 to 18446744073709551612")),
        (("--seed", str(2**64)), ("--seed", "0 to 18446744073709551612")),
        (("--seed", str(2**64 - 1), "--num-images", "2"), ("--seed", "0 to 18446744073709551614")),
        (("--steps", str(10**30)), ("--steps", "1 to 1,000,000")),
        (("--num-images", str(10**9)), ("--num-images", "1 to 1,000,000")),
        (("--width", str(10**9)), ("--width", "1 to 16,384")),
        (("--negative-prompt", os.fsdecode(b"caf\xe9")), ("--negative-prompt", "UTF-8")),
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
    assert word in t2i(*arguments).sentence


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["--promt", "a cat"], "'--promt' is neither a flag .*; did you mean --prompt\\?"),
        (["--nonsense"], "'--nonsense' .*; a key has no dashes"),
        (["a cat"], "'a cat' .*; allowed: as in --prompt \"a cat\""),
        (["--prompt", "a", "cat"], "'cat' .*; allowed: as in --prompt \"a cat\""),
    ],
)
def test_what_is_no_flag_says_what_was_meant(t2i, typed, hint):
    assert re.search(hint, t2i("sample", *typed).sentence)


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


def autoencoder_checkpoint(path: Path, **changes) -> str:
    return write(path, {"weight": torch.zeros(2)}, composed("stage=autoencoder") | changes)


def test_an_autoencoder_draws_nothing_for_prompts(t2i, tmp_path):
    path = autoencoder_checkpoint(tmp_path / "model.safetensors")
    for flags in ([], ["--steps", "2"]):  # which an autoencoder has no key for
        sentence = t2i(*PROMPT, "--checkpoint", path, *flags).sentence
        assert "model.safetensors is of the family autoencoder, which draws nothing for prompts" in sentence


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
    assert not os.path.exists("samples")  # it is said before anything is made


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
    assert len({path.read_bytes() for path in Path("samples").glob("*.png")}) == 2


def test_pictures_are_written(t2i, ldm_file):
    """The same file without a mistake draws."""
    result = t2i(*PROMPT, "--checkpoint", ldm_file, "--num-images", "2", "--steps", "1", "--width", "40")
    assert (result.code, result.err) == (0, "")
    names = sorted(path.name for path in Path("samples").glob("*.png"))
    assert names == ["a-red-circle_0.png", "a-red-circle_1.png", "grid.png"]
    for name in names:
        assert f"samples/{name}" in result.out


def test_a_prompt_that_is_not_utf_8(t2i, ldm_file):
    prompt = ("--prompt", os.fsdecode(b"caf\xe9"), "--num-images", "1")
    assert (
        "--prompt is 'caf\\udce9'; allowed: text in UTF-8"
        in t2i("sample", *prompt, "--checkpoint", ldm_file).sentence
    )
    assert list(Path().iterdir()) == []


def test_the_largest_seed_draws(t2i, ldm_file):
    arguments = ("--checkpoint", ldm_file, "--num-images", "1", "--seed", str(2**64 - 1))
    assert t2i(*PROMPT, *arguments).code == 0
    assert [path.name for path in Path("samples").glob("*.png")] == ["a-red-circle_18446744073709551615.png"]


def changed(source: str, target: Path, **weights: float) -> str:
    """A copy of a weights file with one number of each of `weights` in its place."""
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    for name, value in weights.items():
        tensors[name].view(-1)[-1] = value
    save_file(tensors, target, metadata=metadata)
    return str(target)


@pytest.mark.parametrize(
    "name", ["model.denoiser.out.weight", "model.text.start", "model.codec.latent_scale"]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(t2i, ldm_file, tmp_path, name, bad):
    assert name in load_file(ldm_file)
    path = changed(ldm_file, tmp_path / "bad.safetensors", **{name: bad})
    sentence = t2i(*PROMPT, "--checkpoint", path).sentence
    assert f"{name.removeprefix('model.')} in {path} has 1 numbers of" in sentence
    assert list(Path().iterdir()) == []


def test_pictures_that_are_not_finite(t2i, ldm_file, tmp_path):
    """The weights are finite, what comes of them is not."""
    path = changed(ldm_file, tmp_path / "large.safetensors", **{"model.codec.latent_scale": 1e-38})
    sentence = t2i(*PROMPT, "--checkpoint", path, "--num-images", "2").sentence
    assert "2 of 2 pictures came out with numbers that are not finite" in sentence
    assert "'a red circle' seed 0" in sentence
    assert [path.name for path in Path("samples").iterdir() if not path.name.startswith(".")] == [
        "manifest.jsonl"
    ]


@pytest.mark.parametrize("flag", ["--prompt", "--negative-prompt"])
def test_what_the_text_encoder_does_not_take_is_said(t2i, ldm_file, flag):
    """text=learned takes a start token and max_tokens - 1 words."""
    text = " ".join(f"word{i}" for i in range(40))
    result = t2i(
        *PROMPT,
        flag,
        text,
        "--checkpoint",
        ldm_file,
        "--num-images",
        "1",
    )
    assert result.code == 0
    assert f"{flag} has 41 tokens, of which the text encoder takes 24: 'word23 word24" in result.out
    assert "word39' is left out." in result.out
    short = t2i(*PROMPT, "--checkpoint", ldm_file, "--num-images", "1")
    assert "left out" not in short.out


def run_folder_of(ldm_file: str, name: str, step: int | None = None, age_s: int = 0) -> Path:
    """runs/ldm/NAME with final weights, as training and `t2i convert` leave it, or with a checkpoint of `step`."""
    folder = Path("runs/ldm") / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("{}\n")
    path = folder / "model.safetensors"
    if step is None:
        shutil.copy(ldm_file, path)
    else:
        with safe_open(ldm_file, "pt") as file:
            header = json.loads(file.metadata()["t2i"])
        path = folder / f"checkpoints/step_{step:06}.ckpt"
        torch.save({"state_dict": load_file(ldm_file), "t2i": header}, path)
    os.utime(path, (10**9 - age_s,) * 2)
    return folder


def test_a_converted_run_is_found_and_an_interrupted_one_is_passed_over_with_a_word(t2i, ldm_file):
    few = (*PROMPT, "--num-images", "1", "--steps", "1")
    run_folder_of(ldm_file, "interrupted", step=3, age_s=10)
    assert "Drawing with runs/ldm/interrupted/checkpoints/step_000003.ckpt" in t2i(*few).out
    run_folder_of(ldm_file, "older", age_s=200)
    shutil.rmtree(run_folder_of(ldm_file, "converted", age_s=100) / "checkpoints")
    out = t2i(*few).out
    assert "Drawing with runs/ldm/converted/model.safetensors" in out
    assert (
        "Passed over runs/ldm/interrupted, which did not come to its end: --checkpoint runs/ldm/interrupted"
        in out
    )
    assert "Passed over runs/ldm/older" not in out
    run_folder_of(ldm_file, "newest [a]")
    out = t2i(*few).out
    assert "Drawing with runs/ldm/newest [a]/model.safetensors" in out
    assert "Passed over" not in out


@pytest.mark.parametrize("out", ["file", "file/samples"])
def test_a_folder_that_cannot_be(t2i, ldm_file, out):
    Path("file").write_text("")
    assert (
        f"The folder {out} cannot be made: " in t2i(*PROMPT, "--checkpoint", ldm_file, "--out", out).sentence
    )


def test_ctrl_c_while_drawing(t2i, ldm_file, monkeypatch):
    from t2i.families.latent_diffusion.generator import Generator

    drawn = []

    def generate(self, request, progress=None):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(request)
        return torch.zeros(1, 3, 8, 8)

    monkeypatch.setattr(Generator, "generate", generate)
    result = t2i(*PROMPT, "--checkpoint", ldm_file, "--batch-size", "1")
    assert (result.code, result.err) == (130, "t2i sample: stopped by Ctrl-C.\n")
    assert [path.name for path in Path("samples").glob("*.png")] == ["a-red-circle_0.png"]
    assert "1 picture is kept in samples: the same command goes on from there." in result.out


def test_a_full_disk(t2i, ldm_file, monkeypatch):
    def full(self, file, format, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    sentence = t2i(*PROMPT, "--checkpoint", ldm_file, "--num-images", "1").sentence
    assert "samples/a-red-circle_0.png cannot be used: No space left on device" in sentence
    assert list(Path("samples").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is of Linux")
def test_a_full_disk_at_the_manifest(t2i, ldm_file):
    """A file that is open already, of which the system gives no name."""
    Path("samples").mkdir()
    Path("samples/manifest.jsonl").symlink_to("/dev/full")
    sentence = t2i(*PROMPT, "--checkpoint", ldm_file, "--num-images", "1").sentence
    assert "samples/manifest.jsonl cannot be used: No space left on device" in sentence
    assert Path("samples/a-red-circle_0.png").is_file()


def test_a_report_without_runs(t2i):
    assert "runs/ldm" in t2i("report").sentence


def test_a_report_on_no_run(t2i):
    assert "nowhere" in t2i("report", "--checkpoint", "nowhere").sentence


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--rerank", "4"), "--clip is None; allowed: a folder with a CLIP, with --rerank alone"),
        (("--clip", "folder"), "--clip is 'folder'; allowed: a folder with a CLIP, with --rerank alone"),
        (("--rerank", "0", "--clip", "folder"), "--rerank is 0; allowed: 1 or more"),
    ],
)
def test_reranking_takes_both_flags(t2i, flags, said):
    assert said in t2i("sample", "--prompt", "a red circle", *flags).sentence


def test_reranking_by_what_is_no_clip(t2i, ldm_file):
    Path("empty").mkdir()
    typed = ("--prompt", "a red circle", "--checkpoint", ldm_file, "--rerank", "2", "--clip", "empty")
    assert "empty holds neither open_clip_config.json nor config.json" in t2i("sample", *typed).sentence
