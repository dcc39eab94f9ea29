"""Small tensors from the host reach a GPU without the host waiting."""

from __future__ import annotations

import torch

from t2i.nn.transfer import placed


def test_a_gpu_gets_it_from_page_locked_memory_and_is_not_waited_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, **how: asked.append((device, how)) or tensor
    )
    placed(torch.arange(3), torch.device("cuda"))
    assert asked == ["pinned", (torch.device("cuda"), {"non_blocking": True})]


def test_on_the_host_it_stays_where_it_is():
    tensor = torch.arange(3)
    assert placed(tensor, torch.device("cpu")) is tensor
