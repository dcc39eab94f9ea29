"""Jobs on a real SLURM of two simulated nodes: whatever interrupts them, the weights at the end are those of a run that
nothing interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lab import PATIENCE_S, RUN, STEPS, Slurm

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def reference(slurm: Slurm) -> dict[str, torch.Tensor]:
    """The weights of the run that nothing interrupts."""
    job = slurm.submit("reference")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), slurm.log(job)
    return slurm.weights("reference")


def check_same(slurm: Slurm, name: str, expected: dict[str, torch.Tensor]) -> None:
    found = slurm.weights(name)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    rows = (slurm.run(name) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + STEPS  # each step once


def test_both_nodes_train_one_run(slurm, reference):
    assert list(slurm.run("reference").parent.glob("reference-*")) == []
    job = json.loads((slurm.run("reference") / "slurm.json").read_text())["job"]
    assert slurm.log(job).count("Done:") == 1
    assert (slurm.run("reference") / "metrics.csv").read_text().splitlines()[-1].count(str(8 * STEPS))


def by_signal(slurm: Slurm, job: str, name: str) -> None:
    """As SLURM sends it before the time is over."""
    subprocess.run(["scancel", "--signal=USR1", f"{job}.0"], check=True)


def by_requeue(slurm: Slurm, job: str, name: str) -> None:
    subprocess.run(["scontrol", "requeue", job], check=True)


def by_preemption(slurm: Slurm, job: str, name: str) -> None:
    """A job of a partition that goes before."""
    subprocess.run(
        ["sbatch", "-p", "hi", "-N2", "--exclusive", "--wrap", "sleep 1", "-o", "/dev/null"], check=True
    )


def by_a_dead_rank(slurm: Slurm, job: str, name: str) -> None:
    os.kill(slurm.processes(name)[1], signal.SIGKILL)


def by_a_stopped_rank(slurm: Slurm, job: str, name: str) -> None:
    """It hangs: the other one names it, and ends the run."""
    os.kill(slurm.processes(name)[1], signal.SIGSTOP)


def by_skewed_signals(slurm: Slurm, job: str, name: str) -> None:
    """One rank hears of it some steps before the other."""
    first, second = slurm.processes(name)
    os.kill(second, signal.SIGUSR1)
    time.sleep(0.1)
    os.kill(first, signal.SIGUSR1)


@pytest.mark.parametrize(
    "interrupt",
    [
        *(by_signal, by_requeue, by_preemption, by_a_dead_rank),
        # tests/distributed holds them without SLURM
        *(pytest.param(each, marks=pytest.mark.slow) for each in (by_a_stopped_rank, by_skewed_signals)),
    ],
    ids=lambda f: f.__name__,
)
def test_an_interrupted_run_goes_on_exactly(slurm, reference, interrupt):
    name = interrupt.__name__
    deadline = ["trainer.deadline_s=20"] if interrupt is by_a_stopped_rank else []
    job = slurm.submit(name, f"trainer.checkpoint_every_images={8 * 10}", *deadline)
    slurm.wait_for_steps(name, job, 12)
    interrupt(slurm, job, name)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    check_same(slurm, name, reference)
    named = "process 1 on n2 was last heard of 2" in slurm.log(job)
    assert named is (interrupt is by_a_stopped_rank), slurm.log(job)


def test_a_signal_before_training_is_not_lost(slurm, reference):
    job = slurm.submit("early")
    slurm.until(lambda: {"n": str(len(slurm.processes("early")))}, lambda found: found["n"] == "2", job)
    by_signal(slurm, job, "early")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    check_same(slurm, "early", reference)


def test_what_a_person_has_to_mend_fails_at_once(slurm):
    job = slurm.submit("wrong", "optimizer.learning_rate=1e30", "optimizer.warmup_images=0")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), slurm.log(job)
    assert slurm.log(job).splitlines()[-1].startswith("failed process"), slurm.log(job)
    assert "are not finite" in slurm.log(job).splitlines()[-1]


FAULT = """
import sys, time
from t2i.training import callbacks
moves = callbacks.ProgressBar.on_train_batch_end
def goes_wrong(self, trainer, stage, *more):
    if (trainer.global_rank, stage.steps_done) == (1, 5):
        sys.stderr.write(f"it goes wrong at {time.time()}\\n")
        raise ZeroDivisionError("a fault of the code")
    moves(self, trainer, stage, *more)
callbacks.ProgressBar.on_train_batch_end = goes_wrong
from t2i_cli.main import main
main()
"""


def test_a_fault_in_one_process_ends_the_job_and_its_traceback_comes_first(slurm):
    (slurm.folder / "fault.py").write_text(FAULT)
    wrap = slurm.folder / "wrap.sh"  # in the place of python -m t2i_cli.main
    wrap.write_text(f'#!/bin/bash\nshift 3\nexec {sys.executable} {slurm.folder}/fault.py "$@"\n')
    wrap.chmod(0o755)
    job = slurm.submit("fault", f"cluster.slurm.run_in={wrap}")
    ended = slurm.wait(job)
    now, log = time.time(), slurm.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log
    lines = log.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("it goes wrong at"))
    assert now - float(lines[first].split()[-1]) < 60
    assert (
        next(line for line in lines if "Traceback" in line) == "[rank1]: Traceback (most recent call last):"
    )
    assert lines[-1].startswith("failed process 1 on n2: ZeroDivisionError"), log


def test_a_sweep_is_one_array(slurm, reference):
    job = slurm.submit("sweep", "-m", "seed=0,1")
    for task in ("0", "1"):
        assert slurm.wait(f"{job}_{task}")["JobState"] == "COMPLETED", slurm.log(job)
    first, second = (slurm.weights(f"sweep-{task}") for task in ("0", "1"))
    assert all(torch.equal(first[key], reference[key]) for key in reference)
    assert any(not torch.equal(second[key], reference[key]) for key in reference)


def test_a_data_job_is_one_array(slurm, reference):
    conf = ["cluster.gpu=none", "cluster.gpus_per_node=1", "cluster.nodes=2", "cluster.cpu_cores_per_node=1"]
    experiment = ["experiment=latent_diffusion/tiny_unet_eps", f"builds_on.codec={slurm.run('reference')}"]
    launch = ["cluster=a100x8", *conf, "launch=slurm"]
    said = slurm.t2i("data", "encode", "encoded", *experiment, *slurm.data, *launch)
    job = said.split()[1].rstrip(":")
    for part in ("0", "1"):
        assert slurm.wait(f"{job}_{part}")["JobState"] == "COMPLETED", slurm.log(job)
    assert "64 samples are encoded by process 0 of 2 in 1 shard in" in slurm.log(job)
    assert (slurm.folder / "encoded" / "encoded.json").is_file()


def test_what_is_about_all_shards_is_a_second_job(slurm):
    """Its JSON is that of one process, byte for byte."""
    lists = [each.partition("=")[2] for each in slurm.data if "shards=" in each]
    shards = [path for each in lists for path in each.strip("[]").split(",")]
    conf = ["cluster.gpu=none", "cluster.gpus_per_node=1", "cluster.nodes=2", "cluster.cpu_cores_per_node=1"]
    slurm.t2i("data", "inspect", *shards, "--json", "one.json")
    launch = ["cluster=a100x8", *conf, "launch=slurm"]
    said = slurm.t2i("data", "inspect", *shards, "--json", "two.json", *launch)
    parts, last = (line.split()[1].rstrip(":,") for line in said.splitlines() if line.startswith("Job "))
    assert slurm.job(last)["JobState"] == "PENDING"
    subprocess.run(["scontrol", "requeue", f"{parts}_1"], check=False)  # where it runs already
    assert slurm.wait(last)["JobState"] == "COMPLETED", slurm.log(parts) + slurm.log(last)
    for part in ("0", "1"):
        assert slurm.job(f"{parts}_{part}")["JobState"] == "COMPLETED", slurm.log(parts)
    assert (slurm.folder / "two.json").read_bytes() == (slurm.folder / "one.json").read_bytes()


def test_what_sbatch_refuses_is_one_sentence(slurm):
    command = [
        sys.executable,
        "-m",
        "t2i_cli.main",
        "train",
        "--config-dir",
        str(slurm.folder / "conf"),
        *RUN,
    ]
    command += [*slurm.data, "launch=slurm", "name=refused", "cluster.slurm.partition=none"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=slurm.folder, timeout=PATIENCE_S)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("t2i train: sbatch refused ")
    assert "invalid partition specified: none" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not slurm.run("refused").exists()
