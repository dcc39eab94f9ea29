"""Command lines that hold flags and key=value side by side."""

from __future__ import annotations

import argparse

from t2i.errors import ConfigError


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags that `parser` knows, and the rest, each key=value. Raises ConfigError for anything else."""
    options, overrides = parser.parse_known_args(arguments)
    for override in overrides:
        if override.startswith("-") or "=" not in override:
            raise ConfigError(f"{override!r} is neither a flag (see `{parser.prog} --help`) nor key=value.")
    return options, overrides
