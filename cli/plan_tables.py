"""The tables that `t2i plan` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from t2i import families
from t2i.few import plural

from .console import whole_words

if TYPE_CHECKING:
    from t2i.config import RunConfig
    from t2i.planning.model import Part
    from t2i.planning.plan import Plan

GIGA, GIB = 1e9, 2**30
# The largest first.
TIME = {"days": 86_400.0, "h": 3_600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6}
BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
LABELS = {
    "copies": "16-bit weights",
    "buffers": "gradient buckets",
    "ema": "EMA",
    "encoding": "frozen, at work",
}


def networks_table(plan: Plan) -> Table:
    """Parameters and FLOPs of one training picture, by part."""
    rows = []
    for part in plan.model.parts:
        forward = giga(part.flops.forward) if part.flops else "-"
        backward = giga(part.flops.backward) if part.flops and part.flops.backward else "-"
        rows.append((part.name, "yes" if part.trained else "no", f"{part.parameters:,}", forward, backward))
    rows.append(("together", "", "", "", together(plan.model.parts)))
    if features := plan.model.cacheable:
        read = " and ".join(sorted(features))
        rows.append((f"together, {read} cached", "", "", "", together(plan.model.needed(features))))
    header = ("Networks: GFLOP per picture", "trained", "parameters", "forward", "backward")
    return table(header, rows)


def together(parts: Iterable[Part]) -> str:
    """GFLOP of one training picture."""
    return giga(sum(part.flops.total for part in parts if part.flops))


def drawing_table(plan: Plan) -> Table | None:
    """What a picture takes to draw on one GPU, by network; None where the family does not say."""
    from t2i.planning.drawing import Calls

    def row(name: str, count: str, calls: Sequence[Calls]) -> tuple[str, ...]:
        flops, seconds = (
            sum(c.total_flops for c in calls),
            sum(c.seconds(plan.cluster) for c in calls),
        )
        cached = max(c.cache_bytes for c in calls)
        return name, count, giga(flops), f"{cached / 2**20:,.1f}", measure(seconds, TIME)

    every = [calls for part in plan.model.parts for calls in part.drawing]
    if not every:
        return None
    rows = [row(calls.name, f"{calls.count:,}", [calls]) for calls in every]
    header = ("Drawing: a picture on one GPU", "calls", "GFLOP", "keys, values: MiB", "time, at least")
    return table(header, [*rows, row("together", "", every)])


def memory_table(plan: Plan) -> Table:
    """GiB on one GPU, by part and strategy."""
    from t2i.planning.memory import STRATEGIES
    from t2i.planning.plan import usable_bytes

    def row(label: str, sizes: Iterable[int]) -> tuple[str, ...]:
        return label, *(f"{size / GIB:.2f}" for size in sizes)

    plain = [plan.memory[strategy, False] for strategy in STRATEGIES]
    checkpointed = [plan.memory[strategy, True] for strategy in STRATEGIES]
    rows = [row(LABELS.get(part, part), (getattr(m, part) for m in plain)) for part in vars(plain[0])]
    rows.append(row("activations, checkpointed", (m.activations for m in checkpointed)))
    usable = usable_bytes(plan.cluster)
    for label, memories in (("at most", plain), ("at most, checkpointed", checkpointed)):
        rows.append(row(label, (m.total for m in memories)))
        rows.append(("  fits", *("yes" if m.total <= usable else "NO" for m in memories)))
    pictures = f"{plural(plan.images_per_gpu, 'picture')} per GPU"
    if plan.images_at_a_time < plan.images_per_gpu:
        pictures += f", {plan.images_at_a_time} at a time"
    header = (f"Memory: GiB with {pictures}", *(s.upper() for s in STRATEGIES))
    return table(header, rows)


def traffic_table(plan: Plan) -> Table:
    """GB of a step, by strategy."""
    from t2i.planning.memory import STRATEGIES

    def row(label: str, part: str) -> tuple[str, ...]:
        return label, *(f"{getattr(plan.traffic[strategy], part) / GIGA:,.3f}" for strategy in STRATEGIES)

    rows = [row("weights", "weights"), row("gradients", "gradients")]
    if plan.traffic["ddp"].muon:
        rows.append(row("Muon's matrices", "muon"))
    rows += [row("each GPU", "gpu"), row("each node to others", "node")]
    return table(("Sent in a step: GB", *(s.upper() for s in STRATEGIES)), rows)


def run_table(plan: Plan, config: RunConfig) -> Table:
    """Time, money, data and files."""
    cluster, work, speed, files = plan.cluster, plan.work, plan.speed, plan.checkpoints
    hidden = speed.communication_s - speed.exposed_s
    per_node = speed.images_per_second / cluster.nodes
    linear = speed.images_per_second / speed.ideal_images_per_second
    way = config.trainer.strategy.upper()
    machines = f"{cluster.num_gpus} x {cluster.gpu} in {plural(cluster.nodes, 'node')}"
    share = f"{plan.mfu:.1%} of {cluster.peak_bf16_tflops:g} TFLOP/s, {giga(work.flops)} GFLOP per picture"
    step, computing = (measure(each, TIME) for each in (speed.compute_s + speed.exposed_s, speed.compute_s))
    between, of_it = (measure(each, TIME) for each in (speed.communication_s, hidden))
    rows = [
        ("cluster", f"{machines} of {cluster.node_bandwidth_gbps:g} Gbit/s"),
        ("pictures", f"{work.num_images:,} at {config.resolution.size_px} px"),
        ("steps", f"{work.num_images / work.global_batch:,.0f} of {plural(work.global_batch, 'picture')}"),
        ("MFU", share),
        ("a step", f"{step}, {computing} of it computing"),
        ("between nodes", f"{between} a step by {way}, {of_it} of it while computing"),
        ("images/s", f"{speed.images_per_second:,.0f}, {linear:.0%} of linear scaling"),
        ("per GPU", f"{speed.images_per_second / cluster.num_gpus:,.1f} images/s"),
        ("time", measure(speed.days * TIME["days"], TIME)),
        ("GPU-hours", whole(speed.gpu_hours)),
        ("USD", f"{whole(speed.usd)} at {cluster.usd_per_gpu_hour:.2f} per GPU-hour"),
        (
            "read",
            f"{measure(plan.total_bytes, BYTES)}, {measure(plan.bytes_per_second_per_node, BYTES)}/s per node",
        ),
        (
            "loaders",
            f"{per_node:,.0f} images/s per node of {plan.loader_images_per_second_per_node:,.0f} that they can give",
        ),
        *(
            [
                (
                    "host memory",
                    f"up to {plan.text_bytes_per_node / GIB:.0f} GiB per node for features of captions",
                )
            ]
            if plan.text_bytes_per_node
            else []
        ),
        ("checkpoint", f"{files.training / GIGA:.2f} GB"),
        ("weights", f"{files.weights / GIGA:.2f} GB (model.safetensors)"),
    ]
    if families.get(config.family).formats is not None:
        averaged = "" if config.ema is None else "averaged "
        what = f"{averaged}weights and frozen encoders, float32"
        rows.append(("export", f"{files.export / GIGA:.2f} GB ({what})"))
    return table(("The run", ""), rows, right=False)


def sweep_table(plans: Sequence[Plan]) -> Table:
    """One row per number of nodes: pictures per GPU and step, share of linear scaling, GiB on a GPU."""
    unit = unit_of(max(plan.speed.days for plan in plans) * TIME["days"], TIME)
    rows = [
        (
            f"{plan.cluster.nodes}",
            f"{plan.cluster.num_gpus}",
            f"{plan.images_per_gpu}",
            f"{plan.speed.images_per_second:,.0f}",
            f"{plan.speed.images_per_second / plan.speed.ideal_images_per_second:.0%}",
            f"{plan.speed.days * TIME['days'] / TIME[unit]:,.2f}",
            whole(plan.speed.gpu_hours),
            whole(plan.speed.usd),
            f"{plan.ours.total / GIB:.1f}",
        )
        for plan in plans
    ]
    header = ("Nodes", "GPUs", "batch", "images/s", "linear", unit, "GPU-hours", "USD", "GiB")
    return table(header, rows)


def unit_of(value: float, units: Mapping[str, float]) -> str:
    """The largest of the units in which it is not below 0.1."""
    return next((unit for unit, size in units.items() if value >= 0.1 * size), list(units)[-1])


def measure(value: float, units: Mapping[str, float]) -> str:
    """ "0.338 s", "93.4 MB": three digits or more, in the unit that fits."""
    if value == 0:
        return f"0 {next((unit for unit, size in units.items() if size == 1), list(units)[-1])}"
    number = value / units[unit := unit_of(value, units)]
    return f"{number:,.{max(0, 2 - math.floor(math.log10(number)))}f} {unit}"


def giga(flops: float) -> str:
    """In GFLOP."""
    number = flops / GIGA
    return f"{number:,.1f}" if number >= 1 or number == 0 else f"{number:.2g}"


def whole(number: float) -> str:
    """Without decimals where it is large."""
    if 0 < number < 0.01:
        return "<0.01"
    return f"{number:,.0f}" if number >= 10 or number == 0 else f"{number:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: bool = True) -> Table:
    """Columns after the first are flush right, where `right`."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(header):
        made.add_column(column, justify="right" if i and right else "left")
    for row in rows:
        made.add_row(*row)
    return whole_words(made)
