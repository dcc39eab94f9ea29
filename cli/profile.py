"""`t2i profile`: where the time of a train step goes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from t2i.few import plural
from t2i.schema import check

from .arguments import Parser, parse_with_overrides

MAX_STEPS = 1000  # whose operations are all kept in memory


def run(arguments: list[str]) -> None:
    """Composes as `t2i train` does, trains a few steps, prints the table and names the trace."""
    options, overrides = parse_with_overrides(parser(), arguments)
    check(1 <= options.steps <= MAX_STEPS, "--steps", options.steps, f"1 to {MAX_STEPS}")
    folder = Path(options.out)
    check(folder.is_dir() or not folder.exists(), "--out", options.out, "a folder")
    for override in overrides:
        key, _, value = override.partition("=")
        here = key.lstrip("+~").partition(".")[0] not in ("launch", "cluster")
        check(here, key, value, "not given, as a profile runs here: alone, or under torchrun or srun")
    from .composition import composed_run
    from .train import out_of_memory, typed_run

    config = typed_run(composed_run(overrides, options.config_dir))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library speaks on stderr of what is well
    # Heavy imports only now: a wrong key is reported at once.
    import torch

    from t2i import families
    from t2i.errors import UserError
    from t2i.training.profiling import WARM_UP, profile

    from .console import console, say_what_is_logged
    from .plan_tables import table

    say_what_is_logged()
    try:
        stage_class = families.get(config.family).load_stage(config.stage)
        found = profile(config, stage_class, options.steps, folder)
    except torch.OutOfMemoryError as error:
        raise UserError(out_of_memory(config)) from error
    step = sum(found.milliseconds.values())
    rows = [(part, f"{ms:,.2f}", f"{ms / step:.1%}") for part, ms in found.milliseconds.items()]
    rows.append(("a step", f"{step:,.2f}", f"{1:.1%}"))
    header = (
        f"Mean of {plural(options.steps, 'step')} on {found.device}, after {WARM_UP} to warm up",
        "ms",
        "share",
    )
    console.print(table(header, rows), soft_wrap=False)
    console.print(f"The trace, for ui.perfetto.dev or chrome://tracing, is {found.trace}")


def parser() -> argparse.ArgumentParser:
    """The flags beside those of `t2i train`."""
    made = Parser(
        prog="t2i profile",
        usage="t2i profile stage=NAME [--steps N] [--out DIR] [group=choice ...] [key=value ...]",
        description="Where the time of a train step goes: data, copy, forward, backward, optimizer, communication and "
        "the rest. Trains a few steps, of which nothing stays, as they are at the end of the run, with all that begins "
        "on the way (a discriminator). The parts are timed one after another, a GPU's work included, so that a step "
        "takes longer than in a run.",
        epilog="key=value are those of `t2i train`.",
    )
    made.add_argument("--steps", type=int, default=10, metavar="N", help="that are timed; default: 10")
    made.add_argument(
        "--out", default="profile", metavar="DIR", help="folder for trace.json; default: profile"
    )
    made.add_argument("--config-dir", metavar="DIR", help="folder with configuration of your own")
    return made
