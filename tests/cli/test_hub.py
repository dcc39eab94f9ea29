"""A hub is asked only where text.allow_download says so, however that is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from weight_files import write

from t2i_cli import hub
from t2i_cli.composition import composed_run
from t2i_cli.generators import load
from t2i_cli.train import typed_run

ARGUMENTS = ["stage=ldm", "data=shards", "data.shards=a.tar"]


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # so that it is put back as it was
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "_set_here", False)


@pytest.mark.parametrize("written", ["true", "True", "TRUE"])
@pytest.mark.parametrize("key", ["text.allow_download", "++text.allow_download"])
def test_true_allows_it(written, key):
    hub.stay_offline()
    typed_run(composed_run([*ARGUMENTS, f"{key}={written}"]))
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_file_of_configuration_may_say_so(tmp_path):
    (tmp_path / "experiment").mkdir()
    hub.stay_offline()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntext: {allow_download: True}\n")
    typed_run(composed_run([*ARGUMENTS, "experiment=mine"], str(tmp_path)))
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize("arguments", [["text.allow_download=False"], []])
def test_else_it_is_not_asked(arguments):
    hub.stay_offline()
    typed_run(composed_run([*ARGUMENTS, *arguments]))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("overrides", [[], ["text.allow_download=true"], ["++text.allow_download=true"]])
def test_a_checkpoint_cannot_allow_it(ldm_file, tmp_path, overrides):
    """Who draws has to say so, whatever the run was trained with; it is the same model then."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    hub.stay_offline()
    with safe_open(ldm_file, framework="pt") as file:
        header = json.loads(file.metadata()["t2i"])
    header["config"]["text"]["allow_download"] = True
    path = tmp_path / "model.safetensors"
    write(path, load_file(ldm_file), header["config"], header["extra"])
    loaded = load(path, torch.device("cpu"), overrides)
    assert (os.environ.get("HF_HUB_OFFLINE") is None) == bool(overrides)
    assert loaded.weights == load(Path(ldm_file), torch.device("cpu"), []).weights


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.stay_offline()
    typed_run(composed_run([*ARGUMENTS, "text.allow_download=true"]))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
