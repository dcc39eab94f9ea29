"""What people have lying about: files under other names, of other kinds, in half precision, and models in parts."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from interop_models import same_weights, save_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i.diffusion.config import ScheduleConfig
from t2i.diffusion.schedules import configured_betas
from t2i.errors import CheckpointError, UserError
from t2i.interop import reading
from t2i.interop.compvis_in import nearby, read_schedule
from t2i.interop.convert import Options, prepare, write
from t2i.interop.weights import in_memory
from t2i.schema import parse
from t2i.training import checkpoint, run_folder
from t2i.weight_file import read_weights, weights_format

STEM = "diffusion_pytorch_model"
EVIL = b"\x80\x04cos\nsystem\n(S'exit'\ntR."


def refused(source: Path, **options) -> str:
    with pytest.raises(UserError) as raised:
        prepare(source, source.parent / "out", Options(**options))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def linked(source: Path, target: Path) -> None:
    """A copy that shares its files with the source: what is changed has to be removed first."""
    shutil.copytree(source, target, copy_function=os.link)


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


@pytest.mark.parametrize("name", ["x.ckpt", "x.SAFETENSORS", "x", "x.bin"])
def test_safetensors_under_any_name(sd1_single, sd1_run, convert, tmp_path, name):
    shutil.copy(sd1_single, tmp_path / name)
    run = convert(tmp_path / name, "run")
    assert same_weights(weights_of(run), weights_of(sd1_run))


@pytest.mark.parametrize("name", ["x.safetensors", "x.CKPT", "x"])
def test_pickles_under_any_name(sd1_single, sd1_run, convert, tmp_path, name):
    torch.save({"state_dict": load_file(sd1_single)}, tmp_path / name)
    run = convert(tmp_path / name, "run", prediction="eps")
    assert same_weights(weights_of(run), weights_of(sd1_run))


@pytest.mark.parametrize("name", ["renamed.ckpt", "renamed"])
def test_a_run_of_ours_under_any_name(sd1_run, convert, tmp_path, name):
    from t2i.training import checkpoint

    linked(sd1_run, tmp_path / "run")
    path = (tmp_path / "run/model.safetensors").rename(tmp_path / "run" / name)
    assert checkpoint.load(path).config["stage"] == "ldm"
    assert load_file(convert(path, "single.safetensors")).keys()


KINDS = {
    "": "is empty",
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "is a git-LFS pointer",
    "\n <!DOCTYPE html><html>Not found": "is an HTML page",
    "<html>": "is an HTML page",
    '{"error": "Repository not found"}': "is JSON text",
    "\x1f\x8b\x08": "is a gzip archive",
    "GGUF\x03": "is a GGUF file",
    "Entry not found": "is text; allowed: a file of weights",
    "stage: ldm\nname: a.": "is text; allowed: a file of weights",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(("content", "words"), KINDS.items(), ids=KINDS.values())
def test_what_is_no_weights_is_called_what_it_is(sd1_folder, tmp_path, content, words, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content.encode("latin-1"))
    assert f"{path} {words}" in refused(path)
    folder = tmp_path / "sd1"
    linked(sd1_folder, folder)
    path = folder / f"unet/{STEM}.safetensors"
    path.unlink()
    path.write_bytes(content.encode("latin-1"))
    assert f"{path} {words}" in refused(folder)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer.json"])
def test_a_page_in_place_of_a_configuration(sd1_folder, tmp_path, file):
    folder = tmp_path / "sd1"
    linked(sd1_folder, folder)
    (folder / file).unlink()
    (folder / file).write_text("<html>Not found</html>")
    assert f"{folder / file} is an HTML page" in refused(folder)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_networks_are_looked_at_too(tmp_path, suffix):
    """Those of the perceptual loss, of features and of scores."""
    path, other = tmp_path / f"x{suffix}", {".pth": ".safetensors", ".safetensors": ".pth"}[suffix]
    weights = {"w": torch.zeros(3)}
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    assert torch.equal(read_weights(path.rename(path.with_suffix(other)))["w"], torch.zeros(3))
    torch.save({"w": torch.tensor([1.0, torch.nan])}, tmp_path / "nan.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(UserError, match=r"w in .*nan\.pth has 1 numbers of 2 that are not finite"):
        read_weights(tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"page\.pth is an HTML page"):
        read_weights(tmp_path / "page.pth")


@pytest.mark.parametrize("content", [b"hello", b"not weights", b"PK\x03\x04aaaa", EVIL], ids=repr)
def test_what_is_no_weights_is_one_sentence_in_all_readers(tmp_path, recwarn, content):
    """As pickles, some of these texts lead the reader to a KeyError, and a protocol to a warning."""
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    said = r"x\.pth (is text; |cannot be read (as|without) |was not written by t2i)"
    for read in (read_weights, checkpoint.load, reading.read_weights):
        with pytest.raises(CheckpointError, match=said):
            read(path)
    assert not recwarn.list


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth is empty"):
        read_weights(tmp_path / "x.pth")


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.ckpt", "w") as archive:
        archive.writestr("model.safetensors", b"x")
    assert "is a zip archive without a checkpoint of torch in it" in refused(tmp_path / "model.ckpt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "true.zip")
    assert weights_format(tmp_path / "true.zip") == "pickle"


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1\n", "<!doctype html>", ""])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_text_model_that_is_none(sd1_run, tmp_path, file, content):
    from t2i.config import TextConfig
    from t2i.text import build_text_encoder

    folder = tmp_path / "text"
    linked(sd1_run / "text_encoder", folder)
    for name in ("vocab.json", "merges.txt") if file == "tokenizer.json" else ():
        (folder / name).unlink()
    (folder / file).unlink()
    (folder / file).write_text(content)
    with pytest.raises(UserError) as raised:
        build_text_encoder(TextConfig("clip", str(folder), max_tokens=77))
    assert f"{folder / file} is " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_text_model_whose_pickle_is_called_safetensors(sd1_run, tmp_path):
    from t2i.config import TextConfig
    from t2i.text import build_text_encoder

    folder = tmp_path / "text"
    linked(sd1_run / "text_encoder", folder)
    weights = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is a pickle file; name it model\.bin"):
        build_text_encoder(TextConfig("clip", str(folder), max_tokens=77))


def in_half(folder: Path, dtype: torch.dtype, variant: str, keep: bool = False) -> None:
    """As `save_pretrained(variant=...)` names them."""
    for path in list(folder.rglob("*.safetensors")):
        halved = {name: value.to(dtype) for name, value in load_file(path).items()}
        save_file(halved, path.with_name(f"{path.stem}.{variant}.safetensors"))
        if not keep:
            path.unlink()


def test_a_variant_is_taken_where_it_is_all_there_is(sd1_folder, sd1_run, convert, tmp_path):
    folder = tmp_path / "sd1"
    linked(sd1_folder, folder)
    in_half(folder, torch.float16, "fp16")
    run = convert(folder, "half")
    name = "model.denoiser.input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(weights_of(run)[name], weights_of(sd1_run)[name].half().float())
    notes = prepare(folder, tmp_path / "x", Options()).parts.notes
    for part in (f"unet/{STEM}", f"vae/{STEM}", "text_encoder/model"):
        assert f"{part}.fp16.safetensors was taken: variant fp16." in notes


def test_full_weights_come_before_half_ones(sd1_folder, sd1_run, convert, tmp_path):
    folder = tmp_path / "sd1"
    linked(sd1_folder, folder)
    in_half(folder, torch.float16, "fp16", keep=True)
    run = convert(folder, "run")
    assert same_weights(weights_of(run), weights_of(sd1_run))
    assert not [n for n in prepare(folder, tmp_path / "x", Options()).parts.notes if "variant" in n]


def test_the_variant_without_ema(sd1_folder, convert, tmp_path):
    folder = tmp_path / "sd1"
    linked(sd1_folder, folder)
    path = folder / f"unet/{STEM}.safetensors"
    raw = {name: value + 1 for name, value in load_file(path).items()}
    save_file(raw, path.with_name(f"{STEM}.non_ema.safetensors"))
    name, theirs = "model.denoiser.out.2.bias", "conv_out.bias"
    averaged = load_file(path)[theirs]
    assert torch.equal(weights_of(convert(folder, "ema"))[name], averaged)
    assert torch.equal(weights_of(convert(folder, "raw", ema=False))[name], averaged + 1)
    path.unlink()
    assert torch.equal(weights_of(convert(folder, "only"))[name], averaged + 1)
    notes = prepare(folder, tmp_path / "x", Options()).parts.notes
    assert f"unet/{STEM}.non_ema.safetensors was taken: variant non_ema." in notes


@pytest.mark.parametrize(
    ("file", "index"),
    [
        (STEM + "-0000{}-of-00002.bin", STEM + ".bin.index.json"),
        (STEM + ".fp16-0000{}-of-00002.safetensors", STEM + ".safetensors.index.fp16.json"),
        (STEM + "-0000{}-of-00002.fp16.safetensors", STEM + ".fp16.safetensors.index.json"),
    ],
)
def test_shards(sd1_folder, sd1_run, convert, tmp_path, file, index):
    folder = tmp_path / "sd1"
    linked(sd1_folder, folder)
    path = folder / f"unet/{STEM}.safetensors"
    weights = load_file(path)
    path.unlink()
    places = {}
    for i in (1, 2):
        chosen = {name: weights[name] for name in sorted(weights)[i - 1 :: 2]}
        shard = path.with_name(file.format(i))
        torch.save(chosen, shard) if shard.suffix == ".bin" else save_file(chosen, shard)
        places |= dict.fromkeys(chosen, shard.name)
    path.with_name(index).write_text(json.dumps({"weight_map": places}))
    run = convert(folder, "run")
    assert same_weights(weights_of(run), weights_of(sd1_run))


def test_no_weights_say_what_there_is(sd1_folder, tmp_path):
    folder = tmp_path / "sd1"
    linked(sd1_folder, folder)
    (folder / f"unet/{STEM}.safetensors").rename(folder / "unet/model.onnx")
    sentence = refused(folder)
    assert f"{folder / 'unet'} has no weights" in sentence
    assert "found: config.json, model.onnx" in sentence


@pytest.mark.parametrize(
    "name", ["out.ckpt", "out.pt", "out.bin", "out.gguf", "out.CKPT", "out.zip", "out.onnx"]
)
def test_endings_that_are_not_written(sd1_run, tmp_path, name):
    with pytest.raises(
        UserError, match=r"OUT is .*; allowed: a name that ends in \.safetensors, or a folder's"
    ):
        prepare(sd1_run, tmp_path / name, Options())
    assert prepare(sd1_run, tmp_path / "sd-v1.5", Options()).to == "diffusers"
    assert prepare(sd1_run, tmp_path / "out.SAFETENSORS", Options()).to == "compvis"


def test_the_ending_says_what_is_written_of_any_source(sd1_folder, tmp_path):
    assert prepare(sd1_folder, tmp_path / "out.safetensors", Options()).to == "compvis"
    assert prepare(sd1_folder, tmp_path / "out", Options()).to == "t2i"


SCHEDULES = {
    "linear": {"name": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "sd": {"name": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "other": {"name": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    "cosine": {"name": "cosine"},
    "zero_snr": {
        "name": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "zero_terminal_snr": True,
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("num_train_steps", [1000, 500])
def test_a_table_in_any_precision_tells_its_schedule(schedule, dtype, num_train_steps):
    wanted = schedule | {"num_train_steps": num_train_steps}
    table = betas_of(wanted).to(dtype)
    assert read_schedule({"betas": in_memory(table)}, Path("x")) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_scale_of_latents_in_any_precision(dtype):
    assert nearby(in_memory(torch.tensor(0.18215).to(dtype)), 0.18215) == 0.18215
    assert nearby(in_memory(torch.tensor(0.25).to(dtype)), 0.18215) == 0.25
    assert nearby(in_memory(torch.tensor(0.0312).to(dtype)), 0.18215) == 0.0312


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_our_own_export_is_read_back(tmp_path, convert, dtype):
    save_pipeline(tmp_path / "source", "sd1", beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    run = convert(tmp_path / "source", "run")
    single = convert(run, "single.safetensors", dtype=dtype)
    weights = load_file(single)
    assert weights["betas"].dtype == torch.float32
    halved = {
        name: value.to(weights["model.diffusion_model.out.2.bias"].dtype) for name, value in weights.items()
    }
    save_file(halved, tmp_path / "halved.safetensors")  # as other programs do, the table with the rest
    wanted = run_folder.read_config(run)["schedule"]
    for source in (single, tmp_path / "halved.safetensors"):
        parts = prepare(source, tmp_path / "x", Options()).parts
        assert parse(ScheduleConfig, parts.denoiser.schedule) == parse(ScheduleConfig, wanted)


def betas_of(schedule: dict[str, Any]) -> Tensor:
    return configured_betas(ScheduleConfig(**schedule))


def test_a_tokenizer_that_came_as_one_file_is_written_for_old_readers_too(sd1_folder, convert, tmp_path):
    from interop_models import clip_tokenizer
    from transformers import CLIPTokenizer

    assert not (sd1_folder / "tokenizer/vocab.json").exists()
    run = convert(sd1_folder, "run")
    for folder in (run / "text_encoder", convert(run, "back") / "tokenizer"):
        vocabulary = json.loads((folder / "vocab.json").read_text())
        original = clip_tokenizer("<|endoftext|>")
        assert vocabulary == original.get_vocab()
        alone = tmp_path / f"alone-{folder.name}"
        alone.mkdir()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folder / name, alone)
        captions = ["a red bicycle", "Two cats, one dog! über 3x", ""]
        assert CLIPTokenizer.from_pretrained(alone)(captions).input_ids == original(captions).input_ids


def test_what_fails_half_way_leaves_no_folder(sd1_single, tmp_path, monkeypatch):
    from t2i.interop import run_out

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_out, "write_clip", stop)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        write(prepare(sd1_single, tmp_path / "new/folder/run", Options()))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_that_goes_away_is_blamed_itself(sd1_single, tmp_path):
    shutil.copy(sd1_single, tmp_path / "source.safetensors")
    conversion = prepare(tmp_path / "source.safetensors", tmp_path / "run", Options())
    (tmp_path / "source.safetensors").unlink()
    with pytest.raises(UserError, match=r"source\.safetensors cannot be read: No such file"):
        write(conversion)
    assert list(tmp_path.iterdir()) == []
