"""Checkpoints whose tensors two processes hold between them: each writes its rows, and both are told the same."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import as_torchrun
import pytest
import torch
import torch.distributed as dist
from same_state import same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from t2i.errors import CheckpointError, TrainingError
from t2i.training import checkpoint, state_folder
from t2i.training.divided import like, own, put, whole
from t2i.training.finite import check_before_writing
from t2i.training.saving import StateFolders

STATE = {
    "state_dict": {"a": torch.arange(15.0).reshape(5, 3), "frozen": torch.tensor(3), "one": torch.ones(1)},
    "ema": {"a": torch.arange(15.0).reshape(5, 3) / 2},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(4.0), "moment": torch.ones(5, 3)}}, "lr": 0.1}],
    "t2i": {"config": {}, "extra": {}, "images_seen": 800},
}
DIVIDED = [("state_dict", "a"), ("state_dict", "one"), ("ema", "a")]


def divided_state() -> dict:
    """STATE, with what is trained divided between the processes: three rows of five, and one of one, in the first."""
    mesh = init_device_mesh("cpu", (2,))
    place = lambda x: distribute_tensor(x, mesh, [Shard(0)])  # noqa: E731
    state = {key: dict(part) for key, part in STATE.items() if isinstance(part, dict)}
    for key, name in DIVIDED:
        state[key][name] = place(state[key][name])
    moments = {"step": torch.tensor(4.0), "moment": place(torch.ones(5, 3))}
    return {**state, "optimizer_states": [{"state": {0: moments}, "lr": 0.1}]}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    state, place = divided_state(), Path(folder) / "checkpoints"
    written, failed = [], []
    io = StateFolders(written.append, lambda path, error: failed.append((path.name, error.errno)))
    io.save_checkpoint(state, place / "step_0000001")
    for key, name in DIVIDED:
        own(state[key][name]).fill_(7)  # later steps do not change what is being written
    io.wait()
    for full in range(2):  # the disk of one of them
        save_file = state_folder.save_file
        if rank == full:

            def refuse(*args, **kwargs):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            state_folder.save_file = refuse
        io.save_checkpoint(state, place / f"step_000000{2 + full}")
        io.wait()
        state_folder.save_file = save_file
    assert failed == [("step_0000002", errno.ENOSPC), ("step_0000003", errno.ENOSPC)]
    io.save_checkpoint(state, place / "step_0000004")
    io.wait()
    assert [path.name for path in written] == ["step_0000001", "step_0000004"]

    saved = state_folder.read(place / "step_0000001")
    target = state["state_dict"]["a"]
    put(saved["state_dict"]["a"], target)
    assert torch.equal(whole(target), STATE["state_dict"]["a"])
    moment = like(saved["optimizer_states"][0]["state"][0]["moment"], target)
    assert torch.equal(own(moment), torch.ones(3 - rank, 3))

    check_before_writing([("a", target)], place)
    if rank == 1:
        own(target)[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="a has numbers that are not finite"):
        check_before_writing([("a", target)], place)
    dist.destroy_process_group()


def test_each_process_writes_its_rows(tmp_path):
    as_torchrun.together(worker, (str(tmp_path),))
    first = tmp_path / "checkpoints" / "step_0000001"
    assert sorted(path.name for path in first.parent.iterdir()) == ["step_0000001", "step_0000004"]
    assert {path.name for path in first.glob("shard_*")} == {f"shard_0000{n}.safetensors" for n in range(2)}
    assert len({path.stat().st_mode for path in first.iterdir()}) == 1
    # Here no other process is asked.
    assert same(state_folder.read(first), STATE)
    state_folder.check_whole(first)
    loaded = checkpoint.load(first)
    assert same(loaded.weights, STATE["state_dict"] | STATE["ema"])
    assert same(checkpoint.load(first, use_ema=False).weights, STATE["state_dict"])

    shard = first / "shard_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard_00001\.safetensors is not as it was written"):
        state_folder.check_whole(first)
    shard.unlink()
    assert not state_folder.is_complete(first)
    with pytest.raises(CheckpointError, match="has shards that cannot be read"):
        state_folder.read(first)
