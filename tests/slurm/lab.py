"""A SLURM of two simulated nodes, and what is submitted to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from two_nodes import TWO_NODES

LAB = Path(__file__).with_name("lab.sh")
CLUSTER = f"{TWO_NODES}cpu_cores_per_node: 1\nslurm: {{signal_s: 20}}\n"
PATIENCE_S = 180.0
STEPS = 240
RUN = ["experiment=autoencoder/tiny_kl", "trainer.accelerator=cpu", "logger.tensorboard=false", "cluster=lab"]
RUN += [f"trainer.num_images={8 * STEPS}", "trainer.batch_size=4", "trainer.log_every_steps=1"]

missing = [name for name in ("slurmctld", "slurmd", "munged", "unshare") if shutil.which(name) is None]
if not missing and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
    missing = ["mount namespaces"]  # which a container may forbid
needs = "root" if os.name != "posix" or os.geteuid() else " and ".join(missing)


class Slurm:
    """The lab, and runs that are submitted to it. folder: where `t2i` is called"""

    def __init__(self, folder: Path, data: list[str]) -> None:
        self.folder, self.data = folder, data

    def t2i(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "t2i_cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, name: str, *more: str) -> str:
        """The job's number."""
        conf = ["--config-dir", str(self.folder / "conf")]
        said = self.t2i("train", *conf, *RUN, *self.data, f"name={name}", "launch=slurm", *more)
        return said.split()[1].rstrip(":").partition("_")[0]

    def job(self, number: str) -> dict[str, str]:
        text = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", number], capture_output=True, text=True, check=True
        ).stdout
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def wait(self, number: str) -> dict[str, str]:
        """Until it has ended."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        return self.until(lambda: self.job(number), lambda job: job["JobState"] in ended, number)

    def until(self, look: Callable[[], dict[str, str]], good: Callable[[dict[str, str]], bool], number: str):
        began = time.monotonic()
        while not good(found := look()):
            assert time.monotonic() - began < PATIENCE_S, f"{found}\n{self.log(number)}"
            time.sleep(0.2)
        return found

    def wait_for_steps(self, name: str, number: str, steps: int = 5) -> None:
        path = self.run(name) / "metrics.csv"
        self.until(
            lambda: {"rows": str(len(path.read_text().splitlines()) - 1 if path.is_file() else 0)},
            lambda found: int(found["rows"]) >= steps,
            number,
        )

    def run(self, name: str) -> Path:
        return self.folder / "runs" / "autoencoder" / name

    def log(self, number: str) -> str:
        """Of a job, or of all parts of an array."""
        logs = self.folder.glob("runs/slurm/*/*.log")
        return "\n".join(path.read_text() for path in logs if path.stem.split("_")[0] == number.split("_")[0])

    def processes(self, name: str) -> list[int]:
        """Of the run's ranks, the first rank first."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
                parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
                of_step = b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes()
                variables = (path.parent / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError, ValueError):
                continue
            rank = [int(each.partition(b"=")[2]) for each in variables if each.startswith(b"SLURM_PROCID=")]
            if of_step and rank and f"name={name}".encode() in words and b"t2i_cli.main" in words:
                found[rank[0]] = int(path.parent.name)
        return [found[rank] for rank in sorted(found)]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.run(name) / "model.safetensors")
