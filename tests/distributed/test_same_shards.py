"""Processes that see other shards would each follow an order of their own: that is refused."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from t2i.errors import DataError
from t2i.training.data import _check_same_everywhere


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    _check_same_everywhere("a")
    try:
        _check_same_everywhere("ab"[rank])
    except DataError as error:
        (folder / str(rank)).write_text(str(error))
    dist.destroy_process_group()


def test_other_shards_are_refused_by_every_process(tmp_path):
    mp.spawn(worker, (tmp_path,), nprocs=2)
    for rank in range(2):
        assert "processes 1 see other shards" in (tmp_path / str(rank)).read_text()


def test_one_process_alone_needs_no_others():
    _check_same_everywhere("a")
