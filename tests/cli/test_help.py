"""`t2i --help` is instant, and wrong verbs get one sentence."""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from t2i_cli.main import VERBS

CONF = Path(__file__).parents[2] / "conf"
HEAVY = {
    "torch",
    "torchvision",
    "lightning",
    "hydra",
    "omegaconf",
    "transformers",
    "open_clip",
    "numpy",
    "PIL",
}


def run(*arguments: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "-m", "t2i_cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def imported(*arguments: str) -> set[str]:
    """Top-level names that `t2i *arguments` imports."""
    result = run(*arguments, flags=("-X", "importtime"))
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "argparse" in names or "t2i_cli" in names or "importlib" in names
    return names


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["data", "--help"],
        ["sample", "--help"],
        ["report", "--help"],
        ["convert", "--help"],
        ["profile", "--help"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments):
    assert imported(*arguments) & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], ["stage=ldm", "-h"]], ids=str)
def test_help_of_train_names_every_group_and_choice(t2i, arguments):
    result = t2i("train", *arguments)
    assert (result.code, result.err) == (0, "")
    for path in CONF.glob("*/**/*.yaml"):
        group, *choice = path.relative_to(CONF).with_suffix("").parts
        if group != "cluster":
            (line,) = re.findall(rf"^  {group} +(.*(?:\n   +.*)*)", result.out, re.MULTILINE)
            assert "/".join(choice) in re.split(r",\s+", line)


def test_help_of_train_imports_no_torch():
    assert imported("train", "--help") & (HEAVY - {"hydra", "omegaconf"}) == set()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_names_every_verb(t2i, arguments):
    result = t2i(*arguments)
    assert (result.code, result.err) == (0, "")
    for verb in VERBS:
        assert f"\n  {verb} " in result.out


def test_every_verb_has_its_file():
    import importlib

    for verb in VERBS:
        assert callable(importlib.import_module(f"t2i_cli.{verb}").run)


def test_version(t2i):
    import t2i as package

    assert t2i("--version").out.strip() == package.__version__


def test_an_unknown_verb_in_a_real_process():
    result = run("paint")
    assert (result.returncode, result.stdout) == (2, "")
    (sentence,) = result.stderr.splitlines()
    assert "'paint'" in sentence
    assert all(verb in sentence for verb in VERBS)


def test_a_traceback_is_shown_where_it_is_asked_for(t2i, monkeypatch):
    from t2i.errors import UserError

    monkeypatch.setenv("T2I_TRACEBACK", "1")
    with pytest.raises(UserError):
        t2i("sample", "--prompt", "a", "nonsense")


MODULES = (
    *("convert", "jobs", "plan", "profile", "report", "sample_flags", "serve"),
    *("evaluate.compare", "evaluate.measure", "evaluate.sweep"),
    *(
        f"data.{job}"
        for job in ("dedup", "download", "encode", "filter", "index", "inspect", "make", "pack", "score")
    ),
)


@pytest.mark.parametrize("module", MODULES)
def test_help_says_of_each_flag_what_it_is_and_what_is_taken_without_it(module):
    parser = importlib.import_module(f"t2i_cli.{module}").parser()
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.option_strings:
            said = formatter._expand_help(action) if action.help else ""
            assert said, action.option_strings
            value = action.default
            has_one = (
                isinstance(value, int | float | str) and value is not False and value != argparse.SUPPRESS
            )
            assert not has_one or "default" in said, said
