"""A signal that one of two processes gets ends both after the same step, and they do not ask one another in each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import as_torchrun
import torch
import torch.distributed as dist

from t2i.training import callbacks
from t2i.training.callbacks import StopOnSignal

SIGNALLED = 7  # step of rank 1 in which the signal arrives


def worker(rank: int, folder: str) -> None:
    """Steps take 0.1 s on rank 0 and 0.5 s on rank 1, by a clock of the test's own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stage = SimpleNamespace(steps_done=0, device=torch.device("cpu"))
    callbacks.time.perf_counter = lambda: stage.steps_done * (0.1, 0.5)[rank]
    trainer = SimpleNamespace(world_size=2, should_stop=False)
    stop, asked, all_reduce = StopOnSignal(say=lambda text: None), [], dist.all_reduce

    def counted(*args, **kwargs):
        asked.append(stage.steps_done)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    stop.on_train_start(trainer, stage)
    while not trainer.should_stop and stage.steps_done < 100:
        stage.steps_done += 1
        if (rank, stage.steps_done) == (1, SIGNALLED):
            signal.raise_signal(signal.SIGTERM)
        stop.on_train_batch_end(trainer, stage, None, None, 0)
    stop.restore()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(asked))
    dist.destroy_process_group()


def test_both_end_after_the_same_step_within_seconds(tmp_path):
    as_torchrun.together(worker, (str(tmp_path),))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second == [1, 5, 9]  # every 2 s of the slower one; 9 is the last step of both


COUNTED = """
import sys
import torch.distributed as dist
from t2i.training import callbacks
broadcasts, moves = [], callbacks.ProgressBar.on_train_batch_end
broadcast = dist.broadcast
def counted(*args, **kwargs):
    broadcasts.append(1)
    return broadcast(*args, **kwargs)
def at_end_of_step(self, trainer, stage, *more):
    if stage.steps_done == 1:
        dist.broadcast = counted
    if stage.steps_done == 5:
        dist.broadcast = broadcast
        open(f"broadcasts{trainer.global_rank}", "w").write(str(len(broadcasts)))
    moves(self, trainer, stage, *more)
callbacks.ProgressBar.on_train_batch_end = at_end_of_step
from t2i_cli.main import main
main()
"""


def test_nothing_is_asked_at_each_step(tmp_path, shapes_overrides):
    """As Lightning does by itself, about SIGTERM: on a GPU the host would wait for the answer."""
    code = tmp_path / "run.py"
    code.write_text(COUNTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(code)]
    command += ["train", "experiment=autoencoder/tiny_kl", "trainer.accelerator=cpu", *shapes_overrides]
    command += ["trainer.batch_size=4", "trainer.num_images=40", "logger.tensorboard=false", "name=run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"broadcasts{rank}").read_text() for rank in range(2)] == ["0", "0"]
