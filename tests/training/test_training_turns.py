"""The train step: turns, micro-batches, scaled losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from t2i import families
from t2i.config import OptimizerConfig
from t2i.interfaces import Batch
from t2i.training.finite import SkippedSteps
from t2i.training.randomness import Randomness
from t2i.training.step import Turn, train_step

SETTINGS = OptimizerConfig(learning_rate=0.1, weight_decay=0.0, gradient_clip=0.0, warmup_images=0)


class TwoPlayers:
    """As much of a stage as the train step asks for: a generator and a discriminator that see one another."""

    def __init__(self, every: int = 1, micro_batches: int = 1, clip: float = 0.0) -> None:
        torch.manual_seed(0)
        self.generator, self.discriminator = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
        settings = dataclasses.replace(SETTINGS, gradient_clip=clip)
        self._turns = [
            Turn("discriminator", [list(self.discriminator.parameters())], settings),
            Turn("generator", [list(self.generator.parameters())], settings, every=every),
        ]
        trainer = SimpleNamespace(parts=lambda images: micro_batches, num_images=1000)
        self.config = SimpleNamespace(trainer=trainer, seed=5)
        self.device = torch.device("cpu")
        self.images_seen = self.steps_done = 0
        self.images_per_step = 8
        self.ema = None
        self.skipped = SkippedSteps(self.device)
        self.trainable: list[tuple[bool, bool]] = []
        self.spoilt: str | None = None

    def turns(self) -> list[Turn]:
        return self._turns

    def idle_parameters(self) -> list[nn.Parameter]:
        return []

    def randomness(self, batch: Batch) -> Randomness:
        return Randomness(self.config.seed, batch.position, torch.float64)

    def losses(self, turn: str, batch: Batch, random: Randomness) -> dict[str, Tensor]:
        self.trainable.append((self.generator.weight.requires_grad, self.discriminator.weight.requires_grad))
        fake = self.generator(random.normal("latent", 3))
        sign = 1.0 if turn == "discriminator" else -1.0
        loss = sign * (self.discriminator(fake) - self.discriminator(batch.image.flatten(1)[:, :3])).mean()
        if self.spoilt == turn:
            loss = loss * float("nan")
        return {"loss": loss, f"real_{turn}": batch.image.mean()}

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for m in (self.generator, self.discriminator) for p in m.parameters()]


def batch(size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(size, 3, 2, 2, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(size, 2, dtype=torch.int64)
    names = [str(i) for i in range(size)]
    return Batch(image, names, names, zeros, zeros, [{} for _ in names], torch.arange(size))


def run(stage: TwoPlayers, steps: int = 1, scaler: torch.amp.GradScaler | None = None) -> dict[str, Tensor]:
    optimizers = [turn.build_optimizer() for turn in stage.turns()]

    def backward(loss: Tensor) -> None:
        (loss if scaler is None else scaler.scale(loss)).backward()

    for _ in range(steps):
        metrics = train_step(stage, stage.turns(), optimizers, batch(), backward, scaler)  # type: ignore[arg-type]
    return metrics


def test_each_turn_moves_its_own_and_leaves_no_gradient_in_the_others():
    stage = TwoPlayers()
    before = stage.weights()
    metrics = run(stage)
    assert stage.trainable == [(False, True), (True, False)]
    assert stage.generator.weight.requires_grad
    assert stage.discriminator.weight.requires_grad
    assert all(not torch.equal(a, b) for a, b in zip(before, stage.weights(), strict=True) if a.numel() > 1)
    # Adam's first step is the learning rate, whichever turn it is: none has been stepped twice.
    moved = stage.discriminator.weight.detach() - before[2]
    assert moved.abs().max().item() == pytest.approx(0.1, rel=1e-6)
    assert set(metrics) == {
        *("discriminator", "generator", "real_discriminator", "real_generator"),
        *("gradient_norm_discriminator", "gradient_norm_generator"),
    }
    assert (stage.images_seen, stage.steps_done) == (8, 1)


def test_gradient_norms_are_those_of_each_turn():
    """Of D(G(z)) - D(x) with D(x) = w x + b: mean G(z) - mean x by w, 0 by b; by G's weights
    -w mean z, by its bias -w."""
    stage, given = TwoPlayers(every=2), batch()
    stage.steps_done = 1  # the generator's turn is in the next step
    z = Randomness(5, given.position, torch.float64).normal("latent", 3)
    by_w = (stage.generator(z) - given.image.flatten(1)[:, :3]).mean(0)
    metrics = run(stage)
    assert {name for name in metrics if name.startswith("gradient")} == {"gradient_norm_discriminator"}
    torch.testing.assert_close(
        metrics["gradient_norm_discriminator"], by_w.norm().detach(), rtol=1e-12, atol=0
    )
    stage = TwoPlayers()
    metrics = run(stage)
    w = stage.discriminator.weight.detach()  # the discriminator has moved when it is the generator's turn
    expected = w.norm() * (z.mean(0).square().sum() + 1).sqrt()
    torch.testing.assert_close(metrics["gradient_norm_generator"], expected, rtol=1e-12, atol=0)


def test_a_turn_is_taken_every_so_many_steps():
    stage = TwoPlayers(every=3)
    run(stage, steps=4)
    assert [generator for generator, _ in stage.trainable] == [False, True, False, False, False, True]


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_micro_batches_make_the_same_step(clip):
    whole, parts = TwoPlayers(clip=clip), TwoPlayers(micro_batches=4, clip=clip)
    of_whole, of_parts = run(whole, steps=3), run(parts, steps=3)
    assert len(parts.trainable) == 4 * len(whole.trainable)
    for a, b in zip(whole.weights(), parts.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for name, value in of_whole.items():
        torch.testing.assert_close(value, of_parts[name], rtol=1e-9, atol=1e-12)


def test_a_turn_whose_gradients_are_not_finite_changes_nothing_and_the_other_goes_on():
    stage = TwoPlayers()
    before = stage.weights()
    stage.spoilt = "discriminator"
    run(stage)
    after = stage.weights()
    assert all(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True))
    assert not torch.equal(before[0], after[0])
    assert int(stage.skipped.total) == 1


def test_scaled_losses_make_the_same_step():
    """As precision=16-mixed scales them, by a power of two."""
    plain, scaled = TwoPlayers(clip=0.5), TwoPlayers(clip=0.5)
    run(plain, steps=3)
    run(scaled, steps=3, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    for a, b in zip(plain.weights(), scaled.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_batch_is_split_by_rows():
    whole = batch()
    whole.bad = {"truncated": 2}
    parts = whole.split(4)
    assert [len(part) for part in parts] == [2] * 4
    assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
    assert torch.equal(torch.cat([part.position for part in parts]), whole.position)
    assert [key for part in parts for key in part.key] == whole.key
    assert [part.bad for part in parts] == [{"truncated": 2}, {}, {}, {}]


def test_a_stage_is_asked_for_its_turns_once(compose_run, train, monkeypatch, tmp_path):
    asked = []
    stage = families.get("autoencoder").load_stage("autoencoder")
    turns = stage.turns
    monkeypatch.setattr(stage, "turns", lambda stage: asked.append(0) or turns(stage))
    few = ["trainer.num_images=24", "trainer.sample_every_images=8", "trainer.checkpoint_every_images=8"]
    train(compose_run("experiment=autoencoder/tiny_kl", *few, f"runs_dir={tmp_path}"))
    assert len(asked) == 1


def test_gradients_are_reduced_in_the_last_micro_batch_of_each_turn():
    stage, alone = TwoPlayers(micro_batches=4), []
    open_contexts: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        open_contexts.append("no_sync")
        yield
        open_contexts.pop()

    def backward(loss: Tensor) -> None:
        alone.append(bool(open_contexts))
        loss.backward()

    optimizers = [turn.build_optimizer() for turn in stage.turns()]
    train_step(stage, stage.turns(), optimizers, batch(), backward, None, no_sync)  # type: ignore[arg-type]
    assert alone == [True, True, True, False] * 2
