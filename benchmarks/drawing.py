"""What Parti's and Muse's published sizes take to draw a picture, beside the published times: the table of
docs/planning.md.

    .venv/bin/python benchmarks/drawing.py

Nothing is drawn: FLOPs, weights, keys and values are counted on the meta device, as `t2i plan` does, and one chip is
taken to reach its peak. Default: TPU v4 (275 TFLOP/s in bfloat16, 1,200 GB/s).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from t2i.planning.config import ClusterConfig
from t2i.planning.drawing import Calls, counted_calls
from t2i.planning.model import networks
from t2i_cli.composition import composed_run
from t2i_cli.plan import planned_run

F8, F16 = "autoencoder/vit_vqgan", "autoencoder/vqgan_f16_1024"
# Each with the codec it draws for, then the run at a lower resolution and its own; seconds on TPU v4 (2301.00704,
# table 3).
MODELS: dict[str, tuple[list[tuple[str, str]], float | None]] = {
    "Parti-350M, 256 px": ([("parti/350m", F8)], None),
    "Parti-750M, 256 px": ([("parti/750m", F8)], None),
    "Parti-3B, 256 px": ([("parti/3b", F8)], 6.4),
    "Parti-20B, 256 px": ([("parti/20b", F8)], None),
    "Muse-3B, 256 px": ([("muse/256", F16)], 0.5),
    "Muse-3B, 512 px": ([("muse/512", F8), ("muse/256", F16)], 1.3),
}


def drawn(parts: list[tuple[str, str]]) -> tuple[list[Calls], int, ClusterConfig]:
    """The calls of drawing a picture, the parameters of what was trained on captions, and a cluster to say the machine
    of."""
    (experiment, codec), *low = parts
    config, cluster = planned_run([f"experiment={experiment}", "cluster=a100x8"], None)
    planned = networks(config, built_on(codec, low))
    calls = [calls for network in planned for calls in counted_calls(network)]
    learned = {"transformer", *(network.name for network in planned if network.trained)}
    parameters = sum(each.parameters for each in planned if each.name.removeprefix("low ") in learned)
    return calls, parameters, cluster


def built_on(codec: str, low: list[tuple[str, str]]) -> dict[str, Any]:
    """As `t2i.families.family.Family.plan` takes it."""
    found: dict[str, Any] = {"codec": composed_run([f"experiment={codec}", "codec.num_codes=8192"], None)}
    for experiment, own_codec in low:
        values = composed_run([f"experiment={experiment}", "data.shards=unread.tar"], None)
        found["low"] = {"config": values, "extra": built_on(own_codec, [])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tflops", type=float, default=275.0)
    parser.add_argument("--gb-per-s", type=float, default=1200.0)
    options = parser.parse_args()
    head = (
        "",
        "parameters",
        "calls",
        "TFLOP",
        "keys, values: MiB",
        "arithmetic",
        "memory",
        "at least",
        "published",
    )
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, (parts, published) in MODELS.items():
        calls, parameters, cluster = drawn(parts)
        machine = replace(cluster, peak_bf16_tflops=options.tflops, memory_gb_per_s=options.gb_per_s)
        arithmetic = replace(machine, memory_gb_per_s=None)
        memory = replace(machine, peak_bf16_tflops=1e12)
        seconds = [sum(each.seconds(m) for each in calls) for m in (arithmetic, memory, machine)]
        cells = [
            name,
            f"{parameters / 1e9:.2f}B",
            " + ".join(
                f"{sum(each.count for each in calls if each.name == name):,}"
                for name in ("low transformer", "transformer")
                if any(each.name == name for each in calls)
            ),
            f"{sum(each.total_flops for each in calls) / 1e12:.1f}",
            f"{max(each.cache_bytes for each in calls) / 2**20:,.0f}",
            *(f"{s:.2f} s" for s in seconds),
            "" if published is None else f"{published} s",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
