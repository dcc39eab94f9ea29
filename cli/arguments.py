"""Command lines that hold flags and key=value side by side."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from t2i.errors import ConfigError
from t2i.schema import check

LAUNCH = re.compile(r"launch=|cluster(\.\w+)*=")  # what makes a job of SLURM of a command


@dataclass(frozen=True)
class Launch:
    """words: launch=, cluster= and cluster.KEY=; dry_run, config_dir: as `add_launch` has them"""

    words: list[str]
    dry_run: bool
    config_dir: str | None


class _WithDefaults(argparse.HelpFormatter):
    """Says what is taken where a flag is not given, unless its help says that in its own words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value = action.default
        takes_one = isinstance(value, int | float | str) and value is not False and value != argparse.SUPPRESS
        if not takes_one or not action.option_strings or action.help is None or "default" in action.help:
            return action.help
        return f"{action.help}; default: %(default)s"


class Parser(argparse.ArgumentParser):
    """Of the flags of a verb. What it cannot read raises ConfigError, a sentence in place of all flags."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"formatter_class": _WithDefaults} | how)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`.")


def parse_with_overrides(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags that `parser` knows, and the rest, each key=value. Raises ConfigError for anything else."""
    options, overrides = parser.parse_known_args(arguments)
    for override in overrides:
        if override.startswith("-") or "=" not in override:
            said = f"{override!r} is neither a flag (see `{parser.prog} --help`) nor key=value"
            raise ConfigError(f"{said}; {_hint(parser, override)}")
    return options, overrides


def _hint(parser: argparse.ArgumentParser, word: str) -> str:
    """The end of a sentence about a word that is neither a flag nor key=value."""
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    if not word.startswith("-"):
        example = '--prompt "a cat"' if "--prompt" in flags else "key=value"
        return f"allowed: as in {example}."
    near = difflib.get_close_matches(word.partition("=")[0], flags, n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else "a key has no dashes."


def add_launch(parser: argparse.ArgumentParser) -> None:
    """The flags of commands that cluster=NAME launch=slurm makes a job of SLURM."""
    parser.add_argument(
        "--dry-run", action="store_true", help="with cluster=NAME launch=slurm: print the job's script alone"
    )
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="with launch=slurm: clusters of your own")


def launch_of(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[Launch | None, list[str]]:
    """The job of SLURM that a command line asks for, None where it asks for none, and the command line without that.
    Raises ConfigError for flags of a job without it.

    parser: of the command, with `add_launch`
    """
    flags = Parser(prog=parser.prog, add_help=False)
    add_launch(flags)
    asked, others = taken_out(parser, arguments, LAUNCH, ("dry_run", "config_dir"))
    options, words = flags.parse_known_args(asked)
    if words:
        return Launch(words, options.dry_run, options.config_dir), others
    check(not options.dry_run, "--dry-run", True, "only with launch=slurm")
    check(options.config_dir is None, "--config-dir", options.config_dir, "only with launch=slurm")
    return None, others


def taken_out(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    pattern: re.Pattern[str],
    flags: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """The words that `pattern` matches with these flags of `parser` (by dest) and their values, and all the others,
    both in their order. The value of a flag is no word, and nothing after -- is one."""
    taken, others, left = list[str](), list[str](), list(arguments)
    while left and left[0] != "--":
        flag = _flag(parser, left[0])
        number = 2 if flag is not None and flag.nargs != 0 and "=" not in left[0] else 1
        is_taken = bool(pattern.match(left[0])) if flag is None else flag.dest in flags
        (taken if is_taken else others).extend(left[:number])
        left = left[number:]
    return taken, others + left


def _flag(parser: argparse.ArgumentParser, argument: str) -> argparse.Action | None:
    """The one that an argument names, by its beginning too where it has two dashes, as argparse takes it."""
    known, name = parser._option_string_actions, argument.partition("=")[0]
    if name in known or not name.startswith("--"):
        return known.get(name)
    return next((action for flag, action in known.items() if flag.startswith(name)), None)
