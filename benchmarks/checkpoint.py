"""How long a step waits for a checkpoint, beside one torch.save of the same state, in turns.

    python benchmarks/checkpoint.py --megabytes 2000 --rounds 5

The state is that of AdamW in training: weights, an average, and two moments, in float32. Both write to --folder.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from t2i.training.saving import StateFolders

TENSOR = 4_000_000  # numbers


def state(megabytes: int) -> dict[str, Any]:
    count = max(1, megabytes * 2**20 // (4 * 4 * TENSOR))
    parts = [{str(i): torch.rand(TENSOR) for i in range(count)} for _ in range(4)]
    moments = {i: {"exp_avg": parts[2][str(i)], "exp_avg_sq": parts[3][str(i)]} for i in range(count)}
    return {"state_dict": parts[0], "ema": parts[1], "optimizer_states": [{"state": moments}], "t2i": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    saved = state(options.megabytes)
    failures: list[OSError] = []
    io = StateFolders(lambda path: None, lambda path, error: failures.append(error))
    plain, stall, whole = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for turn in range(options.rounds):
            began = time.perf_counter()
            torch.save(saved, Path(folder) / "plain.pt")
            plain.append(time.perf_counter() - began)
            began = time.perf_counter()
            io.save_checkpoint(saved, Path(folder) / f"step_{turn:07d}")
            stall.append(time.perf_counter() - began)
            io.wait()
            whole.append(time.perf_counter() - began)
            shutil.rmtree(Path(folder) / f"step_{turn:07d}")
    if failures:
        raise SystemExit(str(failures[0]))
    ratio = statistics.median(one / other for one, other in zip(stall, plain, strict=True))
    print(
        f"torch.save {statistics.median(plain):.2f} s, a step waits {statistics.median(stall):.2f} s ({ratio:.2f}x),"
    )
    print(f"until it is written, flushed to the disk and checked {statistics.median(whole):.2f} s")


if __name__ == "__main__":
    main()
