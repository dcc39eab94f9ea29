"""`t2i profile`: its table, and what is wrong in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FLOW = "experiment=pixel_diffusion/tiny_flow_dit"


def test_the_table_and_the_trace(t2i, shapes_overrides):
    result = t2i("profile", FLOW, *shapes_overrides, "--steps", "2", "--out", "there")
    assert result.code == 0, result.err
    rows = dict(re.findall(r"^ ?(\S.*?) +[\d,]+\.\d\d +(-?\d+\.\d)% *$", result.out, re.MULTILINE))
    assert list(rows) == [
        *("data", "copy", "forward", "backward", "optimizer", "communication", "the rest"),
        "a step",
    ]
    *parts, step = map(float, rows.values())
    assert step == 100.0
    assert sum(parts) == pytest.approx(100, abs=0.05 * len(parts))
    assert "Mean of 2 steps on cpu, after 3 to warm up" in result.out
    assert result.out.splitlines()[-1].endswith(" is there/trace.json")
    assert [path.as_posix() for path in sorted(Path().rglob("*"))] == ["there", "there/trace.json"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps is 0; allowed: 1 to 1000"),
        (["--out", "file"], "--out is 'file'; allowed: a folder"),
        (["launch=slurm"], "launch is 'slurm'; allowed: not given"),
        (["cluster=a100x8"], "cluster is 'a100x8'; allowed: not given"),
        (["cluster.nodes=2"], "cluster.nodes is '2'; allowed: not given"),
        (["resume=latest"], "resume is 'latest'; allowed: null"),
        (["trainer.accelerator=tpu"], "trainer.accelerator"),
        (["nonsense=1"], "nonsense"),
        (["--nonsense"], "'--nonsense' is neither a flag"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence(t2i, shapes_overrides, arguments, sentence):
    Path("file").touch()
    assert sentence in t2i("profile", FLOW, *shapes_overrides, *arguments).sentence
    assert [path.name for path in Path().iterdir()] == ["file"]
