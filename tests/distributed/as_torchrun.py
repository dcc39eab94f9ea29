"""Runs in two processes or more, one after the other in the same ones, each as torchrun would have started it."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Two cores are busy for seconds with what each process would import anew.
PRELOADED = ["t2i.training.fit", "t2i_cli.train", "torch.distributed.tensor"]


def free_ports(count: int) -> list[int]:
    """One for each run: a process that comes early would find the last run's first process on an old one."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def together(worker: Callable[..., None], arguments: tuple[Any, ...], count: int = 2) -> None:
    """worker(rank, *arguments) in processes of their own. Raises what one of them raises."""
    import torch.multiprocessing as mp

    multiprocessing.forkserver.set_forkserver_preload(PRELOADED)
    mp.start_processes(worker, arguments, nprocs=count, start_method="forkserver")


def train(rank: int, port: int, typed: Sequence[str], world: int = 2, machines: int = 1) -> Path:
    """`t2i train` with what is typed, as process `rank`; the run's folder."""
    local = world // machines
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(local), "GROUP_RANK": str(rank // local)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    import torch
    from hydra import compose, initialize_config_module
    from rich.console import Console

    from t2i import families
    from t2i.training.fit import fit
    from t2i_cli.composition import checked
    from t2i_cli.train import typed_run

    torch.set_num_threads(1)
    with initialize_config_module("t2i_conf", version_base="1.3"):
        config = typed_run(checked(compose("train", overrides=list(typed)), list(typed)))
    return fit(config, families.get(config.family).load_stage(config.stage), Console(quiet=True)).folder
