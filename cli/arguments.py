"""Command lines that hold flags and key=value side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from t2i.errors import ConfigError
from t2i.schema import check

LAUNCH = ("launch=", "cluster=", "cluster.")  # what makes a job of SLURM of a command


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags that `parser` knows, and the rest, each key=value. Raises ConfigError for anything else."""
    options, overrides = parser.parse_known_args(arguments)
    for override in overrides:
        if override.startswith("-") or "=" not in override:
            raise ConfigError(f"{override!r} is neither a flag (see `{parser.prog} --help`) nor key=value.")
    return options, overrides


def add_launch(parser: argparse.ArgumentParser) -> None:
    """The flags of commands that cluster=NAME launch=slurm makes a job of SLURM."""
    parser.add_argument(
        "--dry-run", action="store_true", help="with cluster=NAME launch=slurm: print the job's script alone"
    )
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="with launch=slurm: clusters of your own")


def launch_words(options: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """Of these key=value what makes a job of SLURM of the command. Raises ConfigError for flags of a job without it."""
    launched = [each for each in words if each.startswith(LAUNCH)]
    if not launched:
        check(not options.dry_run, "--dry-run", True, "only with launch=slurm")
        check(options.config_dir is None, "--config-dir", options.config_dir, "only with launch=slurm")
    return launched
