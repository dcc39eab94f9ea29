"""Files that a stranger made: nothing of theirs runs, and whatever is wrong with them becomes one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i import weight_file
from t2i.config import run_to_dict
from t2i.errors import CheckpointError, UserError
from t2i.interop.convert import Options, prepare, write
from t2i.interop.reading import LightningCallback, read_pickle, read_safetensors, read_weights
from t2i.training import checkpoint, run_folder

CANARY = Path("ran-code")


class TouchesCanary:
    def __reduce__(self):
        return Path.touch, (CANARY,)


class CallsSystem:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


class Evaluates:
    def __reduce__(self):
        return eval, (f"open({str(CANARY)!r}, 'w')",)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Where the canary would be seen; no test may leave it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not CANARY.exists()


def refused(source: Path) -> str:
    """The one sentence that converting `source` ends with."""
    with pytest.raises(UserError) as raised:
        write(prepare(source, source.parent / "out", Options()))
    assert "\n" not in str(raised.value)
    assert not [path.name for path in source.parent.iterdir() if "out" in path.name]
    return str(raised.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize(
    "evil", [TouchesCanary(), CallsSystem(), Evaluates()], ids=lambda e: type(e).__name__
)
def test_a_pickle_that_would_run_code(tmp_path, evil, zip_format, suffix):
    path = tmp_path / f"model{suffix}"
    saved = {"state_dict": {"weight": torch.zeros(2)}, "callbacks": {"evil": evil}}
    torch.save(saved, path, _use_new_zipfile_serialization=zip_format)
    sentence = refused(path)
    assert f"{path} cannot be read without running code that it names" in sentence
    assert any(name in sentence for name in ("getattr", "pathlib", "posix.system", "(eval)"))
    assert ".safetensors" in sentence


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_that_would_run_code(tmp_path, protocol):
    path = tmp_path / "model.ckpt"
    path.write_bytes(pickle.dumps(CallsSystem(), protocol))
    sentence = refused(path)
    if protocol < 4:  # torch gives up on the newer ones before it comes to the name
        assert "posix.system" in sentence
    else:
        assert "is not one that torch.save wrote, or is damaged" in sentence


def test_a_pickle_inside_a_diffusers_folder(sd1_folder, tmp_path):
    folder = tmp_path / "sd1"
    shutil.copytree(sd1_folder, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": CallsSystem()}, folder / "unet/diffusion_pytorch_model.bin")
    assert "running code" in refused(folder)


def lightning_checkpoint(path: Path, module: str, name: str) -> None:
    """As Lightning 1.4 wrote it: {"callbacks": {<class ModelCheckpoint>: {...}}}, the class by its name alone."""
    placeholder = type(name, (), {"__module__": "placeholder_of_the_test"})
    placeholder.__module__, placeholder.__qualname__ = __name__, name
    globals()[name] = placeholder
    state = {"monitor": "val/loss", "best_model_score": torch.tensor(0.5)}
    try:
        torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {placeholder: state}, "epoch": 3}, path)
    finally:
        del globals()[name]
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    for entry in entries:
        if entry.endswith("data.pkl"):
            before = f"c{__name__}\n{name}\n".encode()
            assert before in entries[entry]
            entries[entry] = entries[entry].replace(before, f"c{module}\n{name}\n".encode())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, data in entries.items():
            archive.writestr(entry, data)


def test_the_callback_in_published_files_is_read_without_lightning(tmp_path):
    """sd-v1-4.ckpt has this class as a key."""
    path = tmp_path / "sd-v1-4.ckpt"
    lightning_checkpoint(path, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint"):
        torch.load(path, weights_only=True)
    saved = read_pickle(path)
    assert torch.equal(saved["state_dict"]["w"].read(), torch.ones(2))
    assert list(saved["callbacks"]) == [str(LightningCallback)]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pytorch_lightning.callbacks.model_checkpoint", "Popen"),
        ("pytorch_lightning.callbacks.lambda_function", "ModelCheckpoint"),
        ("subprocess", "Popen"),
    ],
)
def test_other_names_are_not(tmp_path, module, name):
    path = tmp_path / "model.ckpt"
    lightning_checkpoint(path, module, name)
    assert f"{module}.{name}" in refused(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999, 0.9999999])
def test_a_file_that_is_cut_short(tmp_path, sd1_single, suffix, share):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": load_file(sd1_single)}, whole)
    else:
        shutil.copy(sd1_single, whole)
    data = whole.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: int(len(data) * share)])
    assert "cut" in refused(cut)


def test_bytes_changed_at_random(tmp_path, sd1_single):
    """In the places that say what there is: the header, the pickle, the directory of the zip. Either the file is
    refused, or it is as good as another: never another error, and never code of its own."""

    def read(path: Path) -> None:
        with contextlib.suppress(UserError):
            for weight in list(read_weights(path).values())[:5]:
                if weight.nbytes() < 10**7:
                    weight.read()

    checkpoint = tmp_path / "original.ckpt"
    names = OrderedDict((name, value) for name, value in list(load_file(sd1_single).items())[:40])
    torch.save({"state_dict": names}, checkpoint)
    small = tmp_path / "small.safetensors"
    save_file(names, small)
    source = random.Random(0)
    for original in (checkpoint, small):
        data = original.read_bytes()
        ends = (0, 8_000) if original is small else (0, 12_000)
        for _ in range(60):
            changed = bytearray(data)
            for _ in range(source.choice([1, 1, 4, 40])):
                place = source.randrange(*ends) if source.random() < 0.7 else -source.randrange(1, 6_000)
                changed[place] = source.randrange(256)
            path = tmp_path / f"changed{original.suffix}"
            path.write_bytes(changed)
            read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_noise(tmp_path, suffix):
    source = random.Random(1)
    for size in (0, 1, 7, 8, 9, 100, 10_000):
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(source.randbytes(size))
        assert "noise" in refused(path)


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "v": {}},
        {"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"w": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 8]}},
        {"w": [1, 2]},
        [],
        b"{",
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    ids=str,
)
def test_a_header_that_lies(tmp_path, header):
    path = with_header(tmp_path / "lies.safetensors", header, b"12345678")
    with pytest.raises(CheckpointError) as raised:
        read_safetensors(path)
    assert "lies.safetensors" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "long.safetensors" in refused(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_weights_in_a_dtype_that_is_none(tmp_path, sd1_single, dtype):
    weights = load_file(sd1_single)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, tmp_path / "changed.safetensors")
    sentence = refused(tmp_path / "changed.safetensors")
    assert "is stored as" in sentence
    assert "allowed: float32" in sentence


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "x.bin",
        "",
        7,
        "a\0.safetensors",
        "\ud800.safetensors",
    ],
)
def test_an_index_that_leads_elsewhere(sd1_folder, tmp_path, file):
    folder = tmp_path / "sd1"
    shutil.copytree(sd1_folder, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(tmp_path / "secret.safetensors")
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": file}}))
    sentence = refused(folder)
    assert "no weight_map from names to files" in sentence or f"names {file!r}; allowed:" in sentence


@pytest.mark.parametrize(
    "link", ["tokenizer/tokenizer.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"]
)
def test_a_link_out_of_the_folder(sd1_folder, tmp_path, link):
    folder = tmp_path / "sd1"
    shutil.copytree(sd1_folder, folder)
    (folder / link).rename(tmp_path / "secret")
    (folder / link).symlink_to(tmp_path / "secret")
    assert "is a link to a file outside" in refused(folder)


@pytest.mark.parametrize("link", ["vae/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_link_to_itself(sd1_folder, tmp_path, link):
    """Which exists for no one who asks, and has no end for one who follows it."""
    folder = tmp_path / "sd1"
    shutil.copytree(sd1_folder, folder)
    (folder / link).unlink()
    (folder / link).symlink_to(folder / link)
    assert link.partition("/")[0] in refused(folder)


def test_the_links_of_a_hubs_cache(sd1_folder, tmp_path):
    """snapshots/<revision>/... are links to blobs/..."""
    root = tmp_path / "models--someone--sd1"
    folder = root / "snapshots" / "0123abcd"
    shutil.copytree(sd1_folder, folder)
    (root / "blobs").mkdir()
    for i, path in enumerate([p for p in folder.rglob("*") if p.is_file()]):
        path.rename(root / "blobs" / str(i))
        path.symlink_to(os.path.relpath(root / "blobs" / str(i), path.parent))
    write(prepare(folder, tmp_path / "run", Options()))
    assert (tmp_path / "run/model.safetensors").is_file()
    assert not any(path.is_symlink() for path in (tmp_path / "run").rglob("*"))


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "[" * 100_000, "\udcff", '{"_class_name": ["a"]}'], ids=repr
)
def test_json_that_is_none(sd1_folder, tmp_path, file, text):
    folder = tmp_path / "sd1"
    shutil.copytree(sd1_folder, folder)
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    if file.startswith("tokenizer") and text.startswith('{"'):
        return  # a mapping: as good as another
    refused(folder)


def test_a_pickle_that_is_no_dictionary(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.ckpt")
    assert "holds a list" in refused(tmp_path / "list.ckpt")


@pytest.mark.parametrize("read", [read_weights, weight_file.read_weights], ids=lambda read: read.__module__)
def test_a_weight_without_numbers(tmp_path, read):
    torch.save({"w": torch.zeros(2), "gone": torch.zeros(2, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(CheckpointError, match=r"^gone in .*meta\.pt was saved without its numbers"):
        read(tmp_path / "meta.pt")["gone"].read()


def test_a_class_to_import_is_only_a_word(sd1_folder, tmp_path):
    folder = tmp_path / "sd1"
    shutil.copytree(sd1_folder, folder)
    (folder / "evil.py").write_text(f"open({str(CANARY)!r}, 'w')")
    for file, change in {
        "unet/config.json": {"_class_name": "UNet2DConditionModel", "auto_map": {"AutoModel": "evil.Model"}},
        "text_encoder/config.json": {
            "auto_map": {"AutoModel": "evil.Model"},
            "architectures": ["evil.Model"],
        },
        "tokenizer/tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
    }.items():
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write(prepare(folder, tmp_path / "run", Options()))
    assert "evil" not in (tmp_path / "run/text_encoder/config.json").read_text()
    assert "evil" not in (tmp_path / "run/config.yaml").read_text()
    assert "evil" not in (tmp_path / "run/text_encoder/tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"config": ' + "1" * 5000 + "}", "7"], ids=["deep", "long", "7"]
)
def test_a_file_that_says_it_is_ours(tmp_path, text):
    """To `t2i convert` and to all that loads a run."""
    save_file({"w": torch.ones(1)}, tmp_path / "ours.safetensors", metadata={"t2i": text})
    assert "ours.safetensors" in refused(tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "ours.safetensors")
    assert checkpoint.images_seen(tmp_path / "ours.safetensors") is None


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"num_res_blocks": 10**8},
            "backbone describes a network of more than 32,768 weights; allowed: fewer",
        ),
        ({"base_channels": 2**61}, "backbone describes a network of sizes that cannot be"),
        ({"base_channels": 2**70}, "backbone describes a network of sizes that cannot be"),
    ],
    ids=str,
)
def test_a_run_that_claims_any_size(tmp_path, compose_run, sizes, words):
    values = run_to_dict(compose_run("experiment=autoencoder/tiny_vq"))
    values["backbone"] |= sizes
    header = {"t2i": json.dumps({"config": run_folder.as_saved(values), "extra": {}})}
    save_file({"codec.latent_scale": torch.ones(())}, tmp_path / "ours.safetensors", metadata=header)
    assert words in refused(tmp_path / "ours.safetensors")
