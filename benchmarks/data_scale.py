"""What one of 2,048 ranks pays for its order: time and memory to locate its batches among 200,000 shards.

python benchmarks/data_scale.py
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np

from t2i.data.order import ShardOrder
from t2i.data.stream import BATCHES_LOCATED, Positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    tracemalloc.start()
    sizes = np.full(options.shards, options.samples_per_shard, dtype=np.int64)
    began = time.perf_counter()
    order = ShardOrder(sizes, seed=0, segments=16)
    order.locate([0])
    first_s = time.perf_counter() - began
    stream: Any = SimpleNamespace(unit=1)
    positions = Positions(stream, 0, options.batch_size, options.ranks // 2, options.ranks, None)
    taken = []
    for turn in range(40):
        began = time.perf_counter()
        order.locate(positions.positions(turn * BATCHES_LOCATED, BATCHES_LOCATED).ravel())
        taken.append((time.perf_counter() - began) / BATCHES_LOCATED)
    held, peak = tracemalloc.get_traced_memory()
    print(f"first sample {first_s:.2f} s, then {1e6 * statistics.median(taken):.0f} microseconds a batch of")
    print(f"{options.batch_size}, highest {1e6 * max(taken):.0f}")
    print(f"memory {held / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
