"""What the train step costs beside the model: a run's own step inside Lightning against a bare loop over the same
model, optimizer and batches. Interleaved turns, medians over steps, by the processor's time of one thread, which other
jobs on the machine lengthen least.

    python benchmarks/train_step.py [--steps 60] [--rounds 5] [key=value ...]
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.callbacks import Callback
from torch import nn

from t2i import families
from t2i.config import RunConfig
from t2i.nn.precision import chosen
from t2i.training.callbacks import Metrics, StopAtEnd
from t2i.training.data import loader_from
from t2i.training.fit import fresh_start
from t2i.training.optimizer import learning_rate
from t2i.training.stage import BaseStage
from t2i.training.waits import DataWait
from t2i_cli.composition import checked
from t2i_cli.train import typed_run


class Times(Callback):
    """Seconds from the end of each step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.process_time())


def run_config(overrides: list[str], num_images: int) -> RunConfig:
    own = [
        "stage=ldm",
        "data=shapes",
        "trainer.accelerator=cpu",
        f"trainer.num_images={num_images}",
        *overrides,
    ]
    with initialize_config_module("t2i_conf", version_base="1.3"):
        return typed_run(checked(compose("train", own), own))


def built(config: RunConfig) -> BaseStage:
    torch.manual_seed(0)
    return families.get(config.family).load_stage(config.stage)(*fresh_start(config))


def in_lightning(config: RunConfig, batches: list[Any]) -> list[float]:
    times = Times()
    trainer = L.Trainer(
        accelerator=config.trainer.accelerator,
        precision=chosen(config.trainer.precision, torch.device("cpu")),
        max_epochs=-1,
        logger=False,
        callbacks=[StopAtEnd(), Metrics(), times],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(built(config), Batches(batches))
    return [b - a for a, b in itertools.pairwise(times.ends)]


class Batches:
    """Ready batches; what `Metrics` asks of a loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.waiting = DataWait(torch.device("cpu"))

    def __iter__(self) -> Any:
        return iter(self.batches)

    def epochs(self, images: int) -> dict[str, float]:
        return {"": 0.0}


def bare(config: RunConfig, batches: list[Any]) -> list[float]:
    """Loss, backward, clip, step and average, as one would write them in a notebook."""
    stage = built(config)
    stage.train()
    (turn,) = stage.turns()
    optimizer = turn.build_optimizer()
    average = {name: p.detach().clone() for name, p in stage.averages().items()}
    ends, images = [], 0
    for batch in batches:
        for group in optimizer.param_groups:
            rate = learning_rate(config.optimizer, images, config.trainer.num_images)
            group["lr"] = rate * group["rate_scale"]
        optimizer.zero_grad()
        loss = stage.losses(turn.name, batch, stage.randomness(batch))["loss"]
        loss.backward()
        for parameters in turn.groups:
            nn.utils.clip_grad_norm_(parameters, config.optimizer.gradient_clip)
        optimizer.step()
        images += len(batch)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(stage.averages().values()), 0.001)
        ends.append(time.process_time())
    return [b - a for a, b in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    options, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    config = run_config(overrides, 1)
    size = config.trainer.batch_size
    config = run_config(overrides, size * options.steps)
    loader = iter(loader_from(config))
    batches = [next(loader).to("cpu") for _ in range(options.steps)]
    seconds: dict[str, list[float]] = {"bare loop": [], "t2i": []}
    for number in range(options.rounds):
        for name, way in (("bare loop", bare), ("t2i", in_lightning)):
            taken = way(config, batches)[10:]
            seconds[name].append(statistics.median(taken))
            print(f"round {number + 1}  {name:10} {1000 * seconds[name][-1]:8.2f} ms a step", flush=True)
    ratios = [ours / plain for plain, ours in zip(*seconds.values(), strict=True)]
    for name, values in seconds.items():
        print(f"{name:10} {1000 * statistics.median(values):8.2f} ms a step (median of rounds)")
    print(f"overhead   {100 * (statistics.median(ratios) - 1):+8.2f} % (median of the rounds' ratios)")


if __name__ == "__main__":
    main()
