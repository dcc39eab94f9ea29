"""Processes that see other shards would each follow an order of their own: that is refused."""

from __future__ import annotations

import torch.distributed as dist
import torch.multiprocessing as mp

from t2i.errors import DataError
from t2i.training.data import _check_same_everywhere


def worker(rank: int, fingerprints: list[str], file: str, said: dict[int, str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(fingerprints))
    try:
        _check_same_everywhere(fingerprints[rank])
        said[rank] = ""
    except DataError as error:
        said[rank] = str(error)
    dist.destroy_process_group()


def test_other_shards_are_refused_by_every_process(tmp_path):
    with mp.Manager() as manager:
        for number, fingerprints in enumerate((["a", "a"], ["a", "b"])):
            said = manager.dict()
            mp.spawn(worker, (fingerprints, str(tmp_path / str(number)), said), nprocs=2)
            same = fingerprints[0] == fingerprints[1]
            for rank in range(2):
                assert (said[rank] == "") == same
                assert same or "processes 1 see other shards" in said[rank]


def test_one_process_alone_needs_no_others():
    _check_same_everywhere("a")
