from __future__ import annotations

import pytest
import torch

from t2i.launch.processes import own_device
from t2i.launch.ranks import Rank


@pytest.mark.parametrize(("gpus", "expected"), [(4, 3), (1, 0)])
def test_a_process_has_a_gpu_of_its_own_also_where_it_is_shown_no_other(gpus, expected, monkeypatch):
    """As with srun --gpus-per-task=1, where each is number 0."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert own_device(Rank(rank=7, world=8, local=3, local_world=4)) == torch.device("cuda", expected)
    assert current == [torch.device("cuda", expected)]


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(Rank()) == torch.device("cpu")
