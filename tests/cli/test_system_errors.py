"""What the system refuses, and Ctrl-C, end every verb with one sentence."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys

import pytest

from t2i_cli.main import VERBS

REFUSED = {
    "a full disk": (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b.tar"),
        "a/b.tar cannot be used: No space",
    ),
    "without a name": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device."),
    "a read-only folder": (
        PermissionError(errno.EACCES, "Permission denied", "a"),
        "a cannot be used: Permission",
    ),
    "a parent that is a file": (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", b"a/b"),
        "a/b cannot be used: Not",
    ),
    "a name that is taken": (
        FileExistsError(errno.EEXIST, "File exists", "a"),
        "a cannot be used: it is there already",
    ),
    "two names": (
        OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"),
        "a to b cannot be used: Invalid",
    ),
    "of a library": (OSError("3 of 4 bytes came"), "3 of 4 bytes came."),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_the_system_refuses_is_one_sentence(t2i, monkeypatch, verb, error, words):
    def refuse(arguments):
        raise error

    monkeypatch.setattr(importlib.import_module(f"t2i_cli.{verb}"), "run", refuse)
    assert t2i(verb).sentence.startswith(f"t2i {verb}: {words}")


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_is_said_once_and_exits_as_the_shell_expects(t2i, monkeypatch, verb):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"t2i_cli.{verb}"), "run", stop)
    outcome = t2i(verb)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", f"t2i {verb}: stopped by Ctrl-C.\n")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (t2i(verb).code, t2i(verb).err) == (130, "")


def test_a_reader_that_went_away_ends_it_silently():
    code = "import sys; sys.argv = ['t2i', 'report']; import t2i_cli.report, t2i_cli.main\n"
    code += "t2i_cli.report.run = lambda arguments: [print('x' * 100, flush=True) for _ in range(10_000)]\n"
    code += "t2i_cli.main.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
