"""Steps whose gradients are not finite are left out; several in a row end the run; what is saved is finite."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from t2i.codes.vq import Codebook
from t2i.config import OptimizerConfig
from t2i.errors import TrainingError
from t2i.families.autoencoder.stage import Stage
from t2i.training import run_folder, state_folder
from t2i.training.finite import MAX_IN_ROW, SkippedSteps, check_before_writing
from t2i.training.optimizer import build_optimizer

KL = ("experiment=autoencoder/tiny_kl", "ema=short", "name=run", "optimizer.warmup_images=0")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def spoilt(monkeypatch):
    """`spoilt(steps)`: the losses of those steps (counted from 1) are NaN."""
    losses = Stage.losses

    def spoil(steps: set[int]) -> None:
        def spoilt_losses(self, *args):
            found = losses(self, *args)
            return {n: v * float("nan") for n, v in found.items()} if self.steps_done + 1 in steps else found

        monkeypatch.setattr(Stage, "losses", spoilt_losses)

    return spoil


def two_optimizers(muon_scale: float | None) -> list[tuple[list[nn.Parameter], torch.optim.Optimizer]]:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
        config = OptimizerConfig(learning_rate=0.1, muon_scale=muon_scale, warmup_images=0)
        made.append(
            (list(module.parameters()), build_optimizer([module.parameters()], [module[1].weight], config))
        )
    return made


def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int, gradient=None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (
            torch.randn(p.shape, generator=generator) if gradient is None else torch.full_like(p, gradient)
        )
    optimizer.step()


@pytest.mark.parametrize("muon_scale", [None, 2.0])
@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_step_that_is_left_out_changes_nothing(muon_scale, gradient):
    """Neither weights nor the optimizer's averages and counts, bit for bit; the steps around it are as without it."""
    (spoilt, left_out), (clean, plain) = two_optimizers(muon_scale)
    for seed in (1, 2, 3):
        left_out.found_inf = torch.zeros(())
        step(spoilt, left_out, seed)
        step(clean, plain, seed)
        left_out.found_inf = torch.ones(())
        step(spoilt, left_out, seed, gradient)
    for a, b in zip(spoilt, clean, strict=True):
        assert torch.equal(a, b)
        assert left_out.state[a].keys() == plain.state[b].keys()
        for name, value in plain.state[b].items():
            assert torch.equal(left_out.state[a][name], value), name


def test_the_host_does_not_wait_for_the_count():
    """On tensors that hold no data anything that the host had to know would fail."""
    with FakeTensorMode():
        skipped = SkippedSteps(torch.device("cpu"))
        skipped.count([torch.ones(()), torch.ones(())])
    assert skipped.total.shape == skipped.last.shape == ()


def test_counts():
    skipped, seen = SkippedSteps(torch.device("cpu"), total=5), []
    for norms in ([1.0, 2.0], [float("nan"), 1.0], [1.0, float("inf")], [1.0, 1.0]):
        skipped.count([torch.tensor(norm) for norm in norms])
        seen.append((bool(skipped.last), int(skipped.in_row), int(skipped.total)))
    assert seen == [(False, 0, 5), (True, 1, 6), (True, 2, 7), (False, 0, 7)]


def test_one_bad_batch_is_left_out_and_counted(compose_run, train, spoilt, tmp_path):
    spoilt({3})
    arguments = ("trainer.num_images=48", "trainer.log_every_steps=2", f"runs_dir={tmp_path}")
    folder = train(compose_run(*KL, *arguments)).folder
    assert [row.get("skipped_steps") for row in rows(folder)] == ["", "1", "1"]
    assert all(torch.isfinite(torch.tensor(float(row["loss"]))) for row in rows(folder))
    saved = state_folder.read(run_folder.checkpoints(folder)[-1])
    steps = {int(state["step"]) for state in saved["optimizer_states"][0]["state"].values()}
    assert steps == {5, 3}  # of six; the discriminator begins after two
    check_before_writing(load_file(folder / run_folder.FINAL_WEIGHTS).items(), folder)
    assert saved["t2i"]["skipped_steps"] == 1


def test_several_in_a_row_end_the_run_with_the_keys_of_their_batches(compose_run, train, spoilt, tmp_path):
    spoilt(set(range(4, 100)))
    arguments = ("trainer.num_images=800", "trainer.checkpoint_every_images=8", f"runs_dir={tmp_path}")
    with pytest.raises(
        TrainingError, match=rf"{MAX_IN_ROW} steps in a row, up to step {MAX_IN_ROW + 3}"
    ) as raised:
        train(compose_run(*KL, *arguments, "trainer.keep_checkpoints=9"))
    folder = tmp_path / "autoencoder" / "run"
    assert str(folder / "not_finite.json") in str(raised.value)
    keys = json.loads((folder / "not_finite.json").read_text())["keys_by_step"]
    assert list(keys) == [str(step) for step in range(4, 4 + MAX_IN_ROW)]
    assert all(len(of_step) == len(set(of_step)) == 8 for of_step in keys.values())
    for path in run_folder.checkpoints(folder):
        state = state_folder.read(path)
        check_before_writing([*state["state_dict"].items(), *state["ema"].items()], path)
    assert not (folder / run_folder.FINAL_WEIGHTS).exists()


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_learning_rate_far_too_large_keeps_the_last_good_checkpoint(
    compose_run, train, tmp_path, log_every
):
    arguments = ("trainer.keep_checkpoints=1", f"runs_dir={tmp_path}", f"trainer.log_every_steps={log_every}")
    good = train(compose_run(*KL, *arguments, "trainer.num_images=16")).folder
    kept = run_folder.checkpoints(good)
    with pytest.raises(TrainingError, match=r"not finite"):
        train(
            compose_run(
                *KL, *arguments, "trainer.num_images=160", "optimizer.learning_rate=1e30", f"init_from={good}"
            )
        )
    assert run_folder.checkpoints(good) == kept
    assert run_folder.checkpoints(tmp_path / "autoencoder" / "run-2") == []


def test_weights_that_became_infinite_are_not_written(compose_run, train, tmp_path, monkeypatch):
    """By a step whose gradients were finite."""
    step = Stage.training_step

    def overflowing(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if self.steps_done == 2:
            with torch.no_grad():
                next(self.codec.parameters()).fill_(float("inf"))

    write = state_folder.write

    def slow(*args):
        time.sleep(0.5)  # what is being written when the run ends will be there
        write(*args)

    monkeypatch.setattr(Stage, "training_step", overflowing)
    monkeypatch.setattr(state_folder, "write", slow)
    arguments = ("trainer.num_images=32", "trainer.checkpoint_every_images=8", f"runs_dir={tmp_path}")
    with pytest.raises(TrainingError, match=r"step_0000002 is not written: codec\..* not finite"):
        train(compose_run(*KL, *arguments))
    folder = tmp_path / "autoencoder" / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000001"]


def test_a_codebook_keeps_its_codes_through_a_batch_that_is_not_finite():
    """Its averages are moved by the forward pass, not by the optimizer."""
    book = Codebook(16, 3)
    good = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    book(good)
    before = {name: value.clone() for name, value in book.state_dict().items() if name != "steps"}
    for bad in (float("nan"), float("inf")):
        spoilt = good.clone()
        spoilt[1, 2, 3, 3] = bad
        book(spoilt)
    for name, value in before.items():
        assert torch.equal(book.state_dict()[name], value), name
    assert not Codebook(16, 3)(good.fill_(float("nan"))).latent.isfinite().all()
