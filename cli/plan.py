"""`t2i plan`: what a run takes, computed from its configuration without running it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i import families
from t2i.config import check, parse, parse_run
from t2i.errors import UserError
from t2i.few import plural
from t2i.planning.config import Assumptions, ClusterConfig
from t2i.schema import MISSING

from .arguments import Parser, parse_with_overrides
from .composition import composed_run

if TYPE_CHECKING:
    from t2i.config import RunConfig

MAX_NODES = 1_000_000
# What a run builds on, by the part that it needs; up to SMALL_PX the recipe of small machines.
AUTOENCODERS = {"codec": "autoencoder/kl_f8", "token_codec": "autoencoder/vqgan_f16_1024"}
SMALL = {"token_codec": "autoencoder/small_codes"}
SMALL_PX = 64


def run(arguments: list[str]) -> None:
    """Composes the run and what it builds on, counts, prints; with --sweep draws too."""
    options, overrides = parse_with_overrides(parser(), arguments)
    assumed = Assumptions(
        options.mfu,
        options.images_per_second_per_gpu,
        frozenset() if options.cached == "none" else frozenset(options.cached.split(",")),
        options.bytes_per_pixel,
        options.images_per_second_per_core,
    )
    nodes = sweep_nodes(options.sweep)
    config, cluster = planned_run(overrides, options.config_dir)
    builds_on = built_on(config, options.autoencoder, options.config_dir, options.low)
    # Heavy imports only now: a wrong key is reported at once.
    from t2i.planning.model import build_model
    from t2i.planning.plan import make_plan, sweep

    from .console import console
    from .plan_tables import (
        drawing_table,
        memory_table,
        networks_table,
        run_table,
        sweep_table,
        traffic_table,
    )

    model = build_model(config, builds_on)
    part = parts_below(config).get("codec")
    if part is not None and options.autoencoder is None and own_experiment(config) is None:
        usual = usual_experiment(config, part)
        console.print(f"The codec is planned as experiment={usual}; --autoencoder names another.")
    if "low" in builds_on and options.low is None:
        stage = builds_on["low"]["config"]["stage"]
        console.print(
            f"The run at a lower resolution is planned as stage={stage}; --low names an experiment."
        )
    if nodes is None:
        plan = make_plan(config, model, cluster, assumed)
        drawing = drawing_table(plan)
        tables = (memory_table(plan), traffic_table(plan), run_table(plan, config))
        for table in (networks_table(plan), *([drawing] if drawing else []), *tables):
            console.print(table, soft_wrap=False)
        for warning in plan.warnings:
            console.print(f"Warning: {warning}")
        return
    from t2i.planning.picture import draw_scaling

    plans = sweep(config, model, cluster, assumed, nodes)
    console.print(sweep_table(plans), soft_wrap=False)
    for plan in plans:
        for warning in plan.warnings:
            console.print(f"Warning, {plural(plan.cluster.num_gpus, 'GPU')}: {warning}")
    what = " ".join(each for each in overrides if not each.startswith("cluster"))
    heading = f"{what}: {cluster.gpu}, {plans[0].mfu:.1%} MFU"
    try:
        draw_scaling([plan.speed for plan in plans], heading, Path(options.out))
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror}.") from error
    console.print(f"The scaling curve is {options.out}")


def parser() -> argparse.ArgumentParser:
    """The flags: what neither the experiment nor the cluster says."""
    made = Parser(
        prog="t2i plan",
        description="Parameters, FLOPs, memory, time and money of a run, without running it.",
        epilog="Trailing key=value are those of `t2i train`, with cluster=NAME and cluster.KEY=VALUE.",
    )
    made.add_argument("--mfu", type=float, help="share of the peak FLOP/s; default: the cluster's")
    made.add_argument(
        "--images-per-second-per-gpu",
        type=float,
        metavar="RATE",
        help="measured on one GPU, in place of --mfu",
    )
    made.add_argument(
        "--cached",
        default="none",
        metavar="NAMES",
        help="features of `t2i data encode` that are read: latents,text; default: none",
    )
    made.add_argument(
        "--autoencoder",
        metavar="EXPERIMENT",
        help="of the autoencoder that the run builds on, where it does; default: builds_on.experiment, or "
        f"{' or '.join(AUTOENCODERS.values())}, up to {SMALL_PX} px {SMALL['token_codec']}",
    )
    made.add_argument(
        "--low",
        metavar="EXPERIMENT",
        help="of the run at a lower resolution that the run builds on, where it does; default: its stage's recipe",
    )
    made.add_argument("--sweep", metavar="nodes=1,8,32", help="the same run on several numbers of nodes")
    made.add_argument("--out", default="plan.png", metavar="FILE", help="picture of the sweep")
    default = Assumptions()
    for flag, meaning in (
        ("bytes_per_pixel", "of stored pictures"),
        ("images_per_second_per_core", "decoded by one CPU core"),
    ):
        value = getattr(default, flag)
        made.add_argument(
            "--" + flag.replace("_", "-"),
            type=float,
            default=value,
            metavar="X",
            help=f"{meaning}; default: {value:g}",
        )
    made.add_argument("--config-dir", metavar="DIR", help="folder with configuration of your own")
    return made


def sweep_nodes(given: str | None) -> list[int] | None:
    """ "nodes=1,8,32" -> [1, 8, 32], sorted."""
    if given is None:
        return None
    key, _, listed = given.partition("=")
    counts = [int(count) if count.isdecimal() else 0 for count in listed.split(",")]
    ok = key == "nodes" and min(counts) >= 1 and max(counts) <= MAX_NODES
    check(ok, "--sweep", given, f"nodes= and whole numbers of 1 or more, up to {MAX_NODES:,}")
    return sorted(set(counts))


def planned_run(overrides: list[str], config_dir: str | None) -> tuple[RunConfig, ClusterConfig]:
    """The typed configuration of a run and of the cluster that it is planned on. Raises ConfigError."""
    run = [each for each in overrides if not each.startswith("launch=")]
    # launch=slurm has the defaults of what a cluster's file leaves out under slurm:.
    values = _unread(composed_run([*run, "launch=slurm"], config_dir, needed="cluster"))
    cluster = parse(ClusterConfig, values.pop("cluster"), "cluster.")
    return parse_run(values, families.get(values["family"]).load_config()), cluster


def _unread(values: dict[str, Any]) -> dict[str, Any]:
    """A plan reads no pictures."""
    if values["data"]["shards"] == MISSING:
        values["data"]["shards"] = "unread.tar"
    return values


def built_on(
    config: RunConfig, experiment: str | None, config_dir: str | None, low: str | None = None
) -> dict[str, dict[str, Any]]:
    """What the run builds on, as `t2i.families.family.Family.plan` takes it: composed mappings of experiments. Raises
    ConfigError for one that is not what the run's family needs.

    experiment: of the autoencoder, None for the default
    low: of the run at a lower resolution, None for its stage's recipe; its codec is the one whose experiment it names,
        or the run's own
    """
    needs = parts_below(config)
    check(
        experiment is None or len(needs) > 0,
        "--autoencoder",
        experiment,
        "nothing, as this run builds on none",
    )
    found = {}
    for key, part in needs.items():
        chosen = experiment or own_experiment(config) or usual_experiment(config, part)
        found[key] = composed_run([f"experiment={chosen}"], config_dir)
        stages = families.stages_with(part)
        allowed = f"an experiment of stage {' or '.join(stages)}"
        check(found[key]["stage"] in stages, "--autoencoder", experiment, allowed)
    has_low = getattr(config.model, "low", None) is not None
    check(low is None or has_low, "--low", low, "nothing, as this run builds on none at a lower resolution")
    if has_low:
        found["low"] = _low_run(config, found["codec"], low, config_dir)
    return found


def parts_below(config: RunConfig) -> Mapping[str, str]:
    """As `Family.builds_on`, without what its configuration says it does not build on."""
    builds_on = getattr(config.model, "builds_on", None)
    return {} if builds_on is None else families.get(config.family).builds_on


def own_experiment(config: RunConfig) -> str | None:
    """That trains the codec, where the run's configuration names one."""
    return getattr(getattr(config.model, "builds_on", None), "experiment", None)


def usual_experiment(config: RunConfig, part: str) -> str:
    """The one for a "codec" or a "token_codec" of such pictures."""
    return (AUTOENCODERS | (SMALL if config.resolution.size_px <= SMALL_PX else {}))[part]


def _low_run(
    config: RunConfig, codec: dict[str, Any], experiment: str | None, config_dir: str | None
) -> dict[str, Any]:
    """The entry "low" of `built_on`: a run at the resolution at which its codec gives the codes that `config` is given.

    codec: of the run that `config` is, for one that names none
    """
    import torch

    from t2i.families.codec import image_codec

    stages = families.get(config.family).low
    asked = f"stage={stages[0]}" if experiment is None else f"experiment={experiment}"
    values = composed_run([asked], config_dir)
    check(values["stage"] in stages, "--low", experiment, f"an experiment of stage {' or '.join(stages)}")
    if (own := (values["builds_on"] or {}).get("experiment")) is not None:
        codec = composed_run([f"experiment={own}"], config_dir)
    with torch.device("meta"):
        size = config.model.low.side * image_codec(codec).downsampling  # type: ignore[attr-defined]
    values = _unread(composed_run([asked, f"resolution.size_px={size}"], config_dir))
    return {"config": values, "extra": {"codec": codec}}
