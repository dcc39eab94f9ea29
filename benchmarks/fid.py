"""The Fréchet distance at 2,048 features: its matrix root beside scipy's, and all of it for 50,000 cached features.

python benchmarks/fid.py [--samples 50000] [--width 2048]
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
import scipy.linalg
import torch

from t2i.evaluation.distances import Gaussian, frechet


def main() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("--samples", type=int, default=50_000)
    made.add_argument("--width", type=int, default=2048)
    options = made.parse_args()
    torch.manual_seed(0)
    mix = torch.randn(options.width, options.width) / options.width**0.5
    real, drawn = (torch.randn(options.samples, options.width) @ mix + i * 0.1 for i in (0, 1))
    reference = Gaussian.of(real)  # what is cached
    began = time.perf_counter()
    generated = Gaussian.of(drawn)
    moments_s = time.perf_counter() - began
    began = time.perf_counter()
    ours = frechet(reference, generated)
    ours_s = time.perf_counter() - began
    first, second = (each.covariance.numpy() for each in (reference, generated))
    began = time.perf_counter()
    root = scipy.linalg.sqrtm(first @ second)
    theirs_s = time.perf_counter() - began
    square = float((reference.mean - generated.mean).square().sum())
    theirs = square + float(np.trace(first) + np.trace(second) - 2 * np.trace(root).real)
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"mean and covariance of {options.samples:,} x {options.width:,}: {moments_s:.2f} s")
    print(f"distance: ours {ours:.6f} in {ours_s:.2f} s, scipy's sqrtm {theirs:.6f} in {theirs_s:.2f} s")
    print(
        f"ratio {theirs_s / ours_s:.1f}; in all, the reference's statistics cached, {moments_s + ours_s:.2f} s"
    )


if __name__ == "__main__":
    main()
