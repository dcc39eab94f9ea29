"""A wrong `t2i report` ends with 2 and one sentence."""

from __future__ import annotations

from pathlib import Path


def test_a_run_that_draws_nothing_for_prompts(t2i):
    Path("codec").mkdir()
    Path("codec/config.yaml").write_text("stage: autoencoder\ninit_from: null\n")
    sentence = t2i("report", "--checkpoint", "codec").sentence
    assert "--checkpoint is 'codec'; allowed: a run of stage=ldm" in sentence
    assert [path.name for path in Path().iterdir()] == ["codec"]
