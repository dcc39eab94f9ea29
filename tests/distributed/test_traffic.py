"""What a plan says that processes send in a step, against what their network counts while `t2i train` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2i import families
from t2i.config import RunConfig, Strategy
from t2i.planning.config import ClusterConfig
from t2i.planning.model import build_model
from t2i.planning.traffic import Traffic, traffic

STEPS = 6
# Of a network that has these processes alone: what leaves one of them is counted once, with TCP's headers.
TRAIN = """
import time
import torch.distributed as dist
from t2i.training import callbacks
sent, moves = [], callbacks.ProgressBar.on_train_batch_end
def counted(self, trainer, stage, *more):
    if stage.steps_done in (2, 2 + STEPS):
        dist.barrier()
        time.sleep(0.3)
        line = next(each for each in open("/proc/net/dev") if each.strip().startswith("lo:"))
        sent.append(int(line.split()[9]))
        dist.barrier()
    if stage.steps_done == 2 + STEPS and trainer.global_rank == 0:
        open("sent", "w").write(str((sent[1] - sent[0]) / STEPS / dist.get_world_size()))
    moves(self, trainer, stage, *more)
callbacks.ProgressBar.on_train_batch_end = counted
from t2i_cli.main import main
main()
""".replace("STEPS", str(STEPS))
# With Muon, and weights beside the blocks.
EXPERIMENT = "pixel_diffusion/tiny_flow_dit"

own_network = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True)
pytestmark = pytest.mark.skipif(
    own_network.returncode != 0, reason="needs a network of its own (unshare -n, ip), not allowed here"
)


def measured(folder: Path, nodes: int, per_node: int, arguments: list[str]) -> float:
    """Bytes that each process sends in a step."""
    (folder / "run.py").write_text(TRAIN)
    world = nodes * per_node
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(per_node), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "lo"}
    train = [sys.executable, "run.py", "train", *arguments, f"trainer.num_images={world * 4 * (2 + STEPS)}"]
    ranks = "ip link set lo up; for rank in $(seq 0 $((WORLD_SIZE - 1))); do "
    ranks += 'RANK=$rank LOCAL_RANK=$((rank % LOCAL_WORLD_SIZE)) "$@" & done; wait'
    done = subprocess.run(
        ["unshare", "-n", "bash", "-c", ranks, "_", *train],
        env={**os.environ, **shared},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (folder / "sent").is_file(), done.stdout + done.stderr
    return float((folder / "sent").read_text())


def planned(config: RunConfig, strategy: Strategy, nodes: int, per_node: int, micro_batches: int) -> Traffic:
    cluster = ClusterConfig("none", 1.0, 8.0, per_node, nodes, 10.0, 0.0, 2, 0.5)
    assert families.get(config.family).builds_on == {}
    return traffic(build_model(config, {}, "cpu").trained(), strategy, cluster, micro_batches)


def check(
    compose_run, shapes_overrides, folder, strategy, nodes, per_node, micro_batches=1, experiment=EXPERIMENT
) -> None:
    settings = [f"experiment={experiment}", "trainer.precision=32-true"]
    config = compose_run(*settings, "trainer.accelerator=cpu")
    sent = planned(config, strategy, nodes, per_node, micro_batches)
    arguments = [
        *settings,
        *shapes_overrides,
        "trainer.accelerator=cpu",
        "logger.tensorboard=false",
        "name=run",
    ]
    arguments += [
        "trainer.batch_size=4",
        f"trainer.micro_batches={micro_batches}",
        "trainer.log_every_steps=1000",
    ]
    found = measured(folder, nodes, per_node, [*arguments, f"trainer.strategy={strategy}"])
    what = f"{strategy}, {nodes} x {per_node} processes, {micro_batches} micro-batches"
    print(f"{what}: {found:,.0f} bytes, planned {sent.gpu:,.0f}, {found / sent.gpu:.3f}")
    assert sent.gpu == pytest.approx(found, rel=0.1)


@pytest.mark.slow
def test_two_processes(compose_run, shapes_overrides, tmp_path):
    check(compose_run, shapes_overrides, tmp_path, "full_shard", 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "full_shard", "shard_grad_op", "hybrid_shard"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_four_processes(compose_run, shapes_overrides, tmp_path, strategy, micro_batches):
    check(compose_run, shapes_overrides, tmp_path, strategy, 2, 2, micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "full_shard"])
@pytest.mark.parametrize("experiment", ["gan_int_cls/tiny_r1", "pixel_diffusion/tiny_linear_x0_classifier"])
def test_two_turns(compose_run, shapes_overrides, tmp_path, strategy, experiment):
    check(compose_run, shapes_overrides, tmp_path, strategy, 1, 2, experiment=experiment)
