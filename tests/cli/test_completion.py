"""What the tab key completes."""

from __future__ import annotations

import subprocess

import pytest

from t2i_cli.main import VERBS
from t2i_cli.train_help import groups, help_text


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("t2i ", set(VERBS)),
        ("t2i tr", {"train"}),
        ("t2i train stage=", {f"stage={stage}" for stage in groups()["stage"]}),
        ("t2i train stage=ldm text=c", {"text=clip", "text=clip_with_projection"}),
        ("t2i train stage=ldm experiment=sd-v1/2", {"experiment=sd-v1/256"}),
        ("t2i plan cluster=a100x2", {"cluster=a100x256", "cluster=a100x256-40gb"}),
        ("t2i profile stage=l", {"stage=ldm"}),
        ("t2i data encode reso", {"resolution="}),
        ("t2i train 'stage=ldm", set()),
        ("t2i sample --pr", set()),
    ],
)
def test_words_that_may_come_next(t2i, monkeypatch, typed, expected):
    monkeypatch.setenv("COMP_LINE", typed)
    outcome = t2i("-sc", "query=bash")
    assert (outcome.code, outcome.err) == (0, "")
    assert set(outcome.out.split()) == expected


@pytest.mark.parametrize("verb", [(), ("train",)])
def test_the_script_completes_t2i(t2i, verb):
    script = t2i(*verb, "-sc", "install=bash").out
    assert script.splitlines()[-1].split()[-2:] == ["hydra_bash_completion", "t2i"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_shell_that_is_not_known_is_one_sentence(t2i):
    assert "'tcsh'" in t2i("-sc", "install=tcsh").sentence
    assert "install" in t2i("-sc").sentence


def test_each_choice_stands_whole_in_the_help():
    words = {word.strip(",") for word in help_text().split()}
    assert {choice for choices in groups().values() for choice in choices} <= words
