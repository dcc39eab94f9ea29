"""Two processes share Muon's work, and step as one does."""

from __future__ import annotations

from pathlib import Path

import as_torchrun
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from t2i.training import muon
from t2i.training.divided import whole
from t2i.training.muon import MuonAdamW

SHAPES = [(6, 4), (6, 4), (6, 4), (3, 8), (5, 2, 3, 3)]  # three, one and one of a shape
ORTHOGONALISE = muon.orthogonalise


def stepped(mesh: DeviceMesh | None = None) -> list[Tensor]:
    """Weights after three steps; with a mesh each process holds its rows of them."""
    place = (lambda x: x) if mesh is None else (lambda x: distribute_tensor(x, mesh, [Shard(0)]))
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = [nn.Parameter(place(draw(shape))) for shape in SHAPES]
    optimizer = MuonAdamW([{"params": weights, "muon": True}], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for weight in weights:
            weight.grad = place(draw(weight.shape))
        optimizer.step()
    return [whole(weight) for weight in weights]


def worker(rank: int, folder: str, divided: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    done = []

    def counted(matrices: Tensor) -> Tensor:
        done.append(int(matrices.flatten(1).any(1).sum()))
        return ORTHOGONALISE(matrices)

    muon.orthogonalise = counted
    mesh = init_device_mesh("cpu", (2,)) if divided else None
    torch.save({"weights": stepped(mesh), "done": done}, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("divided", [False, True])
def test_each_process_orthogonalises_its_share(divided, tmp_path):
    """Also where each holds some rows of each matrix, of an odd number more in the first."""
    as_torchrun.together(worker, (str(tmp_path), divided))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["done"] == [2, 1, 1] * 3
    assert second["done"] == [1, 0, 0] * 3
    for one, other, alone in zip(first["weights"], second["weights"], stepped(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, alone, rtol=1e-12, atol=1e-12)
