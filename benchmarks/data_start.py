"""A start over many shards, in a process of its own: seconds from the imports to the first batch, the memory above that
of the imports, and that of its reader, which holds but a part of them.

    python benchmarks/data_start.py '{"shards": [...], "min_original_px": 0, "bucket_step_px": null}'

prints one JSON line. Linux only.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401  # what remote shards take is an import, too
import fsspec  # noqa: F401

from t2i.data.loader import build_loader
from t2i.data_config import DataConfig

SIZE_PX = 16


def mib(what: str, process: int | str = "self") -> float:
    """VmRSS or VmHWM, the highest that VmRSS was."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def started(shards: list[str], min_original_px: int, bucket_step_px: int | None) -> dict[str, Any]:
    """One batch of 32, by one worker."""
    before, began, used = mib("VmRSS"), time.perf_counter(), time.process_time()
    data = DataConfig(
        source=None,
        shards=shards,
        caption_keys=["txt", "json:caption"],
        filter_by_size=True,
        num_workers=1,
        cache_mib=0,
        bucket_step_px=bucket_step_px,
        max_aspect=2.0,
    )
    options = {"size_px": SIZE_PX, "batch_size": 32, "text_dropout": 0.1, "seed": 0}
    batches = iter(build_loader(data, min_original_px=min_original_px, **options))  # type: ignore[arg-type]
    batch = next(batches)
    seconds = time.perf_counter() - began
    assert not batch.bad
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    return {
        "s": seconds,
        "cpu_s": time.process_time() - used,
        "mib": mib("VmHWM") - before,
        "worker_mib": mib("VmHWM", worker.pid),
    }


if __name__ == "__main__":
    print(json.dumps(started(**json.loads(sys.argv[1]))))
