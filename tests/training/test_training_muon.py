"""Muon against the singular value decomposition, against PyTorch's own, and in a checkpoint."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from t2i.config import OptimizerConfig
from t2i.training.finite import any_not_finite
from t2i.training.muon import MuonAdamW, orthogonalise
from t2i.training.optimizer import build_optimizer

CONFIG = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, muon_scale=3.0, warmup_images=0)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 16), (16, 64)])
def test_orthogonalised_matrices_keep_their_singular_vectors(rows, columns):
    """U S V^T becomes U V^T, with singular values that the quintic leaves between 0.6 and 1.3."""
    torch.manual_seed(0)
    matrices = torch.randn(3, rows, columns)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalise(matrices).float()
    assert result.shape == matrices.shape
    in_basis = u.mT @ result @ vt.mT
    diagonal = in_basis.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.5) & (diagonal < 1.4)).all()
    assert (in_basis - torch.diag_embed(diagonal)).abs().max() < 0.08  # bfloat16


def test_steps_as_pytorchs_muon_does():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (8, 8), (24, 8), (8, 24))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = build_optimizer([ours], ours, CONFIG)
    for group in optimizer.param_groups:
        group["lr"] = 0.03
    oracle = torch.optim.Muon(theirs, lr=0.03, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        oracle.step()
        for a, b, was in zip(ours, theirs, before, strict=True):
            assert (a - b).norm() < 0.08 * (a - was).norm()  # both in bfloat16, in another order
            b.data.copy_(a.data)


def test_convolutions_are_stepped_as_matrices():
    torch.manual_seed(0)
    convolution = nn.Parameter(torch.randn(8, 4, 3, 3))
    matrix = nn.Parameter(convolution.detach().flatten(1).clone())
    optimizer = build_optimizer([[convolution, matrix]], [convolution, matrix], CONFIG)
    convolution.grad = torch.randn_like(convolution)
    matrix.grad = convolution.grad.flatten(1).clone()
    optimizer.step()
    torch.testing.assert_close(convolution.flatten(1), matrix)


def test_only_hidden_matrices_are_muons_and_their_rate_is_scaled():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    groups = build_optimizer([list(model.parameters())], [model[1].weight], CONFIG).param_groups
    muon = [group for group in groups if group["muon"]]
    assert [group["params"] for group in muon] == [[model[1].weight]]
    assert muon[0]["rate_scale"] == 3.0
    assert all(group["rate_scale"] == 1.0 for group in groups if not group["muon"])
    assert sum(len(group["params"]) for group in groups) == 6


def test_without_a_scale_all_is_adamw():
    model = nn.Linear(4, 4)
    config = OptimizerConfig(learning_rate=0.01, warmup_images=0)
    optimizer = build_optimizer([list(model.parameters())], [model.weight], config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert not isinstance(optimizer, MuonAdamW)
    assert not any(group["muon"] for group in optimizer.param_groups)


@pytest.mark.parametrize("muon_scale", [None, 3.0])
def test_scaled_gradients_are_unscaled_before_the_step_and_infinite_ones_skip_it(muon_scale):
    """As precision=16-mixed has it: gradients are clipped between unscaling and the step."""
    config = OptimizerConfig(learning_rate=0.01, muon_scale=muon_scale, warmup_images=0)
    model = nn.Linear(4, 4)
    optimizer = build_optimizer([list(model.parameters())], [model.weight], config)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = deepcopy(model.state_dict())
    for value, changed in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(value * model(torch.ones(2, 4)).sum()).backward()
        scaler.unscale_(optimizer)
        optimizer.found_inf = any_not_finite([nn.utils.get_total_norm([p.grad for p in model.parameters()])])
        optimizer.step()
        scaler.update()
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all()
            assert torch.equal(parameter, before[name]) != changed


def test_a_loaded_optimizer_goes_on_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    copy = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    first = build_optimizer([list(model.parameters())], [model[1].weight], CONFIG)
    second = build_optimizer([list(copy.parameters())], [copy[1].weight], CONFIG)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        net(torch.randn(5, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, first, 1)
    copy.load_state_dict(model.state_dict())
    second.load_state_dict(deepcopy(first.state_dict()))
    step(model, first, 2)
    step(copy, second, 2)
    for a, b in zip(model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
