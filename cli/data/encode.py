"""`t2i data encode`: features ahead of training, by the overrides of the training command."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from t2i.few import plural
from t2i.schema import check, check_number

from ..arguments import Parser, parse_with_overrides
from ..console import console, progress_bar, say_what_is_logged


def run(arguments: list[str]) -> None:
    """Encodes each dataset of the run under a progress bar and says how to train on it."""
    options, overrides = parse_with_overrides(parser(), arguments)
    check_number("--batch-size", options.batch_size)
    from ..composition import composed_run
    from ..train import typed_run

    config = typed_run(composed_run(overrides))
    say_what_is_logged()
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from t2i import families
    from t2i.data.encoded import lacking_of_pictures
    from t2i.data.reader import as_pair
    from t2i.launch.processes import own_device
    from t2i.launch.ranks import rank_of
    from t2i.training.fit import fresh_start
    from t2i_pipelines.encode import Encoder, encode

    rank = rank_of(os.environ)
    stage = families.get(config.family).load_stage(config.stage)(*fresh_start(config))
    features = stage.features()
    allowed = "a stage with a frozen codec or text encoder"
    check(bool(features), "stage", config.stage, allowed)
    wanted = list(features) if options.features is None else options.features.split(",")
    for name in wanted:
        check(name in features, "--features", name, f"{' and '.join(features)} for stage={config.stage}")
    more = lacking_of_pictures(wanted, features)
    allowed = (
        f"{' and '.join(more)} too, as pictures are not read where one of what is made of them is encoded"
    )
    check(not more, "--features", options.features, allowed)
    features = {name: feature for name, feature in features.items() if name in wanted}
    device = torch.device("cpu") if config.trainer.accelerator == "cpu" else own_device(rank)
    parts = config.data.parts()
    for key, data in parts.items():
        out = Path(options.out) / (key.removeprefix("data.mixture.") if len(parts) > 1 else "")
        encoder = Encoder(
            features,
            device,
            options.dtype,
            options.batch_size,
            data.horizontal_flip,
            config.trainer.precision,
        )
        columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with progress_bar(*columns) as bar:
            task = bar.add_task("samples", total=None)
            report = encode(
                encoder,
                data,
                as_pair(config.resolution.size_px),
                config.resolution.min_original_px,
                out,
                rank,
                lambda done, total: bar.update(task, completed=done, total=total),  # noqa: B023
            )
        there = f", {plural(report.skipped, 'was', 'were')} there" if report.skipped else ""
        who = f" by process {rank.rank} of {rank.world}" if rank.world > 1 else ""
        encoded, shards = plural(report.encoded, "sample is", "samples are"), plural(report.shards, "shard")
        console.print(f"{encoded} encoded{who} in {shards} in {out}{there}")
        for cause, count in report.bad.most_common():
            console.print(f"Left out, {cause}: {count}")
        console.print(f"To train on them, add to the training command: {key}.encoded={out}")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="t2i data encode",
        description="What the training command would compute by frozen weights (latents, text features), ahead of it. "
        "Give the key=value arguments of the training command; under torchrun or srun each process takes its own "
        "shards.",
    )
    made.add_argument("out", help="folder; shards that are there are not made again")
    made.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16", help="of what is kept")
    made.add_argument("--batch-size", type=int, default=32, help="pictures at a time")
    made.add_argument(
        "--features",
        help="of what the stage names, separated by commas; the others are computed while training",
    )
    return made
