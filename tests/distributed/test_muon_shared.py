"""Two processes share Muon's work, and step as one does."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from t2i.training import muon
from t2i.training.muon import MuonAdamW

SHAPES = [(6, 4), (6, 4), (6, 4), (3, 8), (5, 2, 3, 3)]  # three, one and one of a shape
ORTHOGONALISE = muon.orthogonalise


def stepped() -> list[Tensor]:
    """Weights after three steps."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = [nn.Parameter(draw(shape)) for shape in SHAPES]
    optimizer = MuonAdamW([{"params": weights, "muon": True}], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for weight in weights:
            weight.grad = draw(weight.shape)
        optimizer.step()
    return [weight.detach() for weight in weights]


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    done = []

    def counted(matrices: Tensor) -> Tensor:
        done.append(int(matrices.flatten(1).any(1).sum()))
        return ORTHOGONALISE(matrices)

    muon.orthogonalise = counted
    torch.save({"weights": stepped(), "done": done}, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_each_process_orthogonalises_its_share(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["done"] == [2, 1, 1] * 3
    assert second["done"] == [1, 0, 0] * 3
    for one, other, alone in zip(first["weights"], second["weights"], stepped(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, alone, rtol=1e-12, atol=1e-12)
