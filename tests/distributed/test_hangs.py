"""A process that keeps the others waiting ends the run at the deadline, and is named: one that was stopped, one that
sleeps."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DEADLINE_S = 8.0
# Steps as in training: something of one's own, then an exchange with the others.
STEPS = """
import os, sys, time
import torch, torch.distributed as dist
from t2i.launch import processes
from t2i.launch.watch import doing

rank = processes.join(os.environ, float(sys.argv[1])).rank
print("joined", flush=True)
for step in range(100_000):
    doing("data", step)
    if (rank, step) == (int(sys.argv[2]), 20):
        time.sleep(600)
    doing("backward")
    dist.all_reduce(torch.ones(3))
    time.sleep(0.01)
"""
# `t2i train`, in which process 1 sleeps, or fails, when its bar is to move after step 5.
TRAIN = """
import os, sys, time
from t2i.training import callbacks
how, moves = sys.argv.pop(1), callbacks.ProgressBar.on_train_batch_end
def goes_wrong(self, trainer, stage, *more):
    if (trainer.global_rank, stage.steps_done) == (1, 5):
        sys.stderr.write(f"it goes wrong at {time.time()}\\n")
        if how == "sleep":
            time.sleep(600)
        raise ZeroDivisionError("a fault of the code")
    moves(self, trainer, stage, *more)
if how != "stop":
    callbacks.ProgressBar.on_train_batch_end = goes_wrong
from t2i_cli.main import main
main()
"""
RUN = [
    "train",
    "experiment=autoencoder/tiny_kl",
    "trainer.accelerator=cpu",
    "name=run",
    "trainer.batch_size=4",
]
RUN += ["trainer.num_images=800000", "trainer.log_every_steps=1", "logger.tensorboard=false"]


@contextmanager
def started(folder: Path, code: str, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of one run, as torchrun would start them, but which nobody ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def ended(process: subprocess.Popen[str], within_s: float = 60.0) -> str:
    """What a process said on its way out."""
    _, said = process.communicate(timeout=within_s)
    assert process.returncode in (1, 2), said  # 2: the main thread noticed that the other one had ended
    return said


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_and_the_other_one_ends(tmp_path, stopped):
    with started(tmp_path, STEPS, str(DEADLINE_S), "-1") as both:
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        time.sleep(2 * DEADLINE_S / 20 + 0.5)  # it has told how far it is
        both[stopped].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        said = ended(both[1 - stopped])
        assert time.monotonic() - began > 0.8 * DEADLINE_S
        assert f"t2i: process {stopped} on {socket.gethostname()} was last heard of" in said
        assert "s ago, at step " in said
        assert "trainer.deadline_s=8" in said


def test_a_sleeping_process_is_named_by_the_first_and_both_end(tmp_path):
    with started(tmp_path, STEPS, str(DEADLINE_S), "1") as both:
        said = [ended(process) for process in both]
    assert f"t2i: process 1 on {socket.gethostname()} keeps the others waiting for " in said[0]
    assert "at step 20 (data), __main__:" in said[0]
    assert "process" not in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", "stop"])
def test_a_run_that_hangs_in_the_middle_says_who_is_missing(tmp_path, shapes_overrides, how):
    arguments = [*RUN, *shapes_overrides, "trainer.deadline_s=30"]
    with started(tmp_path, TRAIN, how, *arguments) as both:
        if how == "stop":
            rows = tmp_path / "runs" / "autoencoder" / "run" / "metrics.csv"
            while not (rows.is_file() and len(rows.read_text().splitlines()) > 50):
                assert both[0].poll() is None, both[0].communicate()
                time.sleep(0.1)
            both[1].send_signal(signal.SIGSTOP)
        said = ended(both[0], 180.0)
    found = [line for line in said.splitlines() if line.startswith("t2i: process 1 on ")]
    assert len(found) == 1, said
    if how == "sleep":
        assert "keeps the others waiting for 3" in found[0]
        assert "at step 5 (after the step), __main__:" in found[0]
    else:
        assert "was last heard of 3" in found[0]


@pytest.mark.slow
def test_under_torchrun_a_fault_in_one_process_ends_all_and_its_traceback_comes_first(
    tmp_path, shapes_overrides
):
    code = tmp_path / "run.py"
    code.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(code)]
    done = subprocess.run(
        [*command, "raise", *RUN, *shapes_overrides],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    now = time.time()
    lines = done.stderr.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("it goes wrong at"))
    assert done.returncode != 0
    assert now - float(lines[first].split()[-1]) < 60
    assert lines[first + 1] == "[rank1]: Traceback (most recent call last):"
    assert "[rank1]: ZeroDivisionError: a fault of the code" in lines
    assert [line for line in lines if line.startswith("[rank0]")] == []
    of_first = [line for line in lines if line.startswith("t2i train")]
    assert len(of_first) == 1
    assert of_first[0].startswith("t2i train: Another process of this run ended")
