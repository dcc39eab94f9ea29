"""The Fréchet distance at 2,048 features: its matrix root beside scipy's, and all of it for 50,000 cached features.

python benchmarks/fid.py [--samples 50000] [--width 2048] [--rounds 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import scipy.linalg
import torch

from t2i.evaluation.distances import Gaussian, frechet

T = TypeVar("T")


def main() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("--samples", type=int, default=50_000)
    made.add_argument("--width", type=int, default=2048)
    made.add_argument("--rounds", type=int, default=3)
    options = made.parse_args()
    torch.manual_seed(0)
    mix = torch.randn(options.width, options.width) / options.width**0.5
    real, drawn = (torch.randn(options.samples, options.width) @ mix + i * 0.1 for i in (0, 1))
    reference = Gaussian.of(real)  # what is cached
    generated, moments = timed(lambda: Gaussian.of(drawn))
    first, second = (each.covariance.numpy() for each in (reference, generated))
    small = Gaussian.of(torch.randn(100, 50))
    frechet(small, small)  # the libraries start their threads
    turns: list[tuple[Took, Took, Took]] = []
    for _ in range(options.rounds):
        afresh = dataclasses.replace(reference)  # keeps nothing of the turn before
        ours, own = timed(lambda afresh=afresh: frechet(afresh, generated))
        _, further = timed(lambda afresh=afresh: frechet(afresh, generated))  # the reference's factor is kept
        root, theirs = timed(lambda: scipy.linalg.sqrtm(first @ second))
        turns.append((own, further, theirs))
    own, further, theirs = (
        Took(*map(statistics.median, zip(*side, strict=True))) for side in zip(*turns, strict=True)
    )
    square = float((reference.mean - generated.mean).square().sum())
    expected = square + float(np.trace(first) + np.trace(second) - 2 * np.trace(root).real)
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"mean and covariance of {options.samples:,} x {options.width:,}: {moments}")
    print(f"distance: ours {ours:.6f} in {own}, scipy's sqrtm {expected:.6f} in {theirs}")
    print(f"ratio {theirs.wall_s / own.wall_s:.1f}, of processor time {theirs.cpu_s / own.cpu_s:.1f}")
    ratios = theirs.wall_s / further.wall_s, theirs.cpu_s / further.cpu_s
    print(
        f"each further one to this reference: {further}, ratio {ratios[0]:.1f}, of processor time {ratios[1]:.1f}"
    )
    print(f"in all, the reference's statistics cached: {moments.wall_s + own.wall_s:.2f} s")


class Took(NamedTuple):
    wall_s: float
    cpu_s: float

    def __str__(self) -> str:
        return f"{self.wall_s:.2f} s ({self.cpu_s:.2f} of processor time)"


def timed(run: Callable[[], T]) -> tuple[T, Took]:
    began, cpu_began = time.perf_counter(), time.process_time()
    out = run()
    return out, Took(time.perf_counter() - began, time.process_time() - cpu_began)


if __name__ == "__main__":
    main()
