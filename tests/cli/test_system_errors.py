"""What the system refuses, and Ctrl-C, end every verb with one sentence."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

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
    "a NUL in a name": (ValueError("embedded null byte"), "A name of a file or folder has a NUL"),
    "of a library": (OSError("3 of 4 bytes came"), "3 of 4 bytes came."),
    "a sentence": (
        OSError("There is no home folder; set XDG_CACHE_HOME."),
        "There is no home folder; set XDG_CACHE_HOME.",
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_the_system_refuses_is_one_sentence(t2i, monkeypatch, verb, error, words):
    def refuse(arguments):
        raise error

    monkeypatch.setattr(importlib.import_module(f"t2i_cli.{verb}"), "run", refuse)
    assert t2i(verb).sentence.startswith(f"t2i {verb}: {words}")


LIBRARIES = {
    "a GPU's memory": (
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        "The GPU's memory is not enough; a smaller batch takes less (CUDA out of memory. Tried to allocate 2.00 GiB).",
    ),
    "a GPU's memory, by its libraries": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "The GPU's memory is not enough; a smaller batch takes less (CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ),
    "the machine's memory": (
        RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."),
        "This machine's memory is not enough",
    ),
    "Python's memory": (MemoryError(), "This machine's memory is not enough (MemoryError)."),
    "a reader that was killed": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ..."),
        "A process that reads data was ended by the system",
    ),
    "a compiler": (
        RuntimeError(
            "InvalidCxxCompiler: No working C++ compiler found in (None, 'g++')\n\nSet TORCHDYNAMO_VERBOSE=1"
        ),
        "Compiling (trainer.compile, --compile) needs a C++ compiler, such as g++, and Python's headers (InvalidCxx",
    ),
    "Python's headers": (
        RuntimeError(
            "CppCompileError: C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\nfatal error: Python.h"
        ),
        "Compiling (trainer.compile, --compile) needs a C++ compiler, such as g++, and Python's headers (CppCompile",
    ),
    "a compiler, by Triton": (
        RuntimeError(
            "CalledProcessError: Command '['/usr/bin/gcc', '/tmp/a/cuda_utils.c']' returned non-zero"
        ),
        "Compiling (trainer.compile, --compile) needs a C++ compiler, such as g++, and Python's headers (CalledPro",
    ),
    "a driver": (
        RuntimeError("The NVIDIA driver on your system is too old"),
        "The GPU cannot be used (The NVIDIA",
    ),
    "a process that is gone": (
        RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:37017"),
        "Another process of this run ended",
    ),
}


@pytest.mark.parametrize(("error", "words"), LIBRARIES.values(), ids=LIBRARIES)
def test_what_libraries_raise_for_a_machine_is_one_sentence(t2i, monkeypatch, error, words):
    def fail(arguments):
        raise error

    monkeypatch.setattr(importlib.import_module("t2i_cli.sample"), "run", fail)
    assert t2i("sample").sentence.startswith(f"t2i sample: {words}")


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 cannot be multiplied"), KeyError("a"), ValueError()]
)
def test_a_fault_of_the_code_keeps_its_traceback(t2i, monkeypatch, error):
    def fail(arguments):
        raise error

    monkeypatch.setattr(importlib.import_module("t2i_cli.sample"), "run", fail)
    with pytest.raises(type(error)):
        t2i("sample")


@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_is_said_once_and_exits_as_the_shell_expects(t2i, monkeypatch, verb):
    def stop(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"t2i_cli.{verb}"), "run", stop)
    outcome = t2i(verb)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", f"t2i {verb}: stopped by Ctrl-C.\n")
    further = {"LOCAL_RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    for environment in further:  # Lightning's second process; the first one on torchrun's second machine
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            assert (t2i(verb).code, t2i(verb).err) == (130, "")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_numbers_of_the_environment_that_are_none(t2i, monkeypatch, name):
    """One of the things that an error itself asks for."""
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", name: "x"}.items():
        monkeypatch.setenv(key, value)
    assert (
        t2i("train", "stage=ldm", "data=shapes").sentence
        == f"t2i train: {name} is 'x'; allowed: whole numbers."
    )


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


@pytest.mark.parametrize(
    "words",
    [
        "convert a@b out",
        "convert config.json out --vae a@b",
        "sample --prompt x --checkpoint a@b",
        "sample --recipe a@b",
        "evaluate a@b",
        "train stage=autoencoder runs_dir=a@b",
        "train stage=autoencoder data=shards data.shards=a@b.tar",
        "data pack a@b.csv out",
        "data download a@b.csv out",
        "data filter a@b.tar out",
        "data dedup a@b.tar out",
        "data index none.tar --out a@b",
        "data inspect none.tar --json a@b",
        "data encode a@b stage=ldm data=shards data.shards=x.tar",
    ],
)
def test_a_nul_in_a_name_is_one_sentence(t2i, words):
    """No shell can give one, a file can."""
    before = list(Path().rglob("*"))
    assert t2i(*(word.replace("@", "\0") for word in words.split())).sentence
    assert list(Path().rglob("*")) == before
