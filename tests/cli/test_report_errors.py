"""A wrong `t2i report` ends with 2 and one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i import families


def test_a_run_that_draws_nothing_for_prompts(t2i):
    Path("codec").mkdir()
    Path("codec/config.yaml").write_text("stage: autoencoder\ninit_from: null\n")
    sentence = t2i("report", "--checkpoint", "codec").sentence
    stages = ", ".join(families.stages_with("generator"))
    assert f"--checkpoint is 'codec'; allowed: a run of stage {stages}." in sentence
    assert [path.name for path in Path().iterdir()] == ["codec"]


def test_no_runs(t2i):
    sentence = t2i("report", "--runs-dir", "elsewhere").sentence
    for stage in families.stages_with("generator"):
        assert f"elsewhere/{stage}" in sentence
    assert "train one, or name one by --checkpoint" in sentence


@pytest.mark.parametrize("place", ["", "nowhere", "file"])
def test_what_is_no_run(t2i, place):
    Path("file").write_text("")
    assert "is not a run folder" in t2i("report", "--checkpoint", place).sentence
    assert [path.name for path in Path().iterdir()] == ["file"]
