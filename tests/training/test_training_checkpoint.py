"""Files of strangers: refused with a sentence, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from t2i.errors import CheckpointError
from t2i.training.checkpoint import load, load_into

SAVED = {
    "state_dict": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.zeros(2)},
    "ema": {"weight": torch.ones(2, 3)},
    "t2i": {"format": 1, "config": {"seed": 3}, "images_seen": 8, "steps_done": 1, "extra": {"codec": {}}},
}


class Touch:
    """Its pickle makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",))


@pytest.fixture
def good(tmp_path) -> Path:
    path = tmp_path / "good.ckpt"
    torch.save(SAVED, path)
    return path


def test_averaged_weights_take_the_place_of_the_raw_ones_when_asked(good):
    averaged, raw = load(good), load(good, use_ema=False)
    assert torch.equal(averaged.weights["weight"], SAVED["ema"]["weight"])
    assert torch.equal(raw.weights["weight"], SAVED["state_dict"]["weight"])
    assert torch.equal(averaged.weights["bias"], SAVED["state_dict"]["bias"])
    assert averaged.config == {"seed": 3}
    assert averaged.extra == {"codec": {}}


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_checkpoint_that_would_run_code_is_refused(form, tmp_path):
    made = tmp_path / "made"
    harm = SAVED | {"hyper_parameters": Touch(made)}
    path = tmp_path / "harm.ckpt"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"t2i": Touch(made)}))
    else:
        torch.save(harm, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"harm\.ckpt"):
        load(path)
    assert not made.exists()
    torch.load(path, weights_only=False) if form != "plain pickle" else pickle.loads(path.read_bytes())
    assert made.exists(), "the file is harmless, so that this test shows nothing"


def test_a_file_cut_short_anywhere_is_refused(good, tmp_path):
    whole, path = good.read_bytes(), tmp_path / "cut.ckpt"
    for size in [0, 1, 3, 100, *range(150, len(whole), 211), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
            load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_pickle_is_refused(good, tmp_path):
    """Changed bytes in the pickle make the reader fail in many ways: all of them are one sentence."""
    path = tmp_path / "damaged.ckpt"
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in members if name.endswith("data.pkl")]
    content = members[name]
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        place = int(torch.randint(len(content), (1,), generator=generator))
        value = int(torch.randint(256, (1,), generator=generator))
        changed = content[:place] + bytes([value]) + content[place + 1 :]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for member, kept in members.items():
                archive.writestr(member, changed if member == name else kept)
        try:
            load(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_foreign_files_are_named(tmp_path):
    foreign = tmp_path / "foreign.ckpt"
    for content in ({"state_dict": {}}, [1, 2], torch.zeros(2)):
        torch.save(content, foreign)
        with pytest.raises(CheckpointError, match=r"foreign\.ckpt was not written by t2i"):
            load(foreign)
    text = tmp_path / "text.ckpt"
    text.write_text("a page that says the file has moved")
    with pytest.raises(CheckpointError, match=r"text\.ckpt"):
        load(text)
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"t2i": "not JSON"}, {"t2i": "{}"}, {"t2i": "3"}]
)
def test_foreign_safetensors_are_named(metadata, tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors"):
        load(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors"):
        load(path)


def test_weights_that_do_not_fit_are_named():
    module, source = nn.Linear(3, 2), Path("some.ckpt")
    with pytest.raises(
        CheckpointError,
        match=r"some\.ckpt .*: 1 weight is missing \(bias\), 1 weight is unknown \(gain\)",
    ):
        load_into(module, {"weight": torch.zeros(2, 3), "gain": torch.zeros(2)}, source)
    with pytest.raises(CheckpointError, match=r"weight has shape \(3, 2\), the model wants \(2, 3\)"):
        load_into(module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, source)
    weights = {"codec.weight": torch.ones(2, 3), "codec.bias": torch.ones(2), "other": torch.zeros(1)}
    load_into(module, weights, source, prefix="codec.")
    assert module.weight.eq(1).all()
