"""`t2i train`: Hydra composes the arguments, t2i.config validates, t2i.training trains."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t2i.errors import ConfigError, UserError

if TYPE_CHECKING:
    from t2i.config import RunConfig


def run(arguments: list[str]) -> None:
    """Composes and trains; `--cfg job`, `--multirun`, `--config-dir` and `--help` are Hydra's own."""
    typed = sys.argv
    # Hydra reads sys.argv. Lightning starts further processes by running sys.argv again, so that the task
    # puts back what was typed.
    sys.argv = ["t2i train", *(quoted(argument) for argument in arguments)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving with 1
    failed: list[UserError] = []

    def task(composed: DictConfig) -> None:
        sys.argv = typed
        try:
            train(composed)
        except UserError as error:  # raised below: Hydra would print its own preamble
            failed.append(error)
        except OmegaConfBaseException as error:
            failed.append(ConfigError(sentence(error)))

    try:
        with explained():
            hydra.main(version_base="1.3", config_path="pkg://t2i_conf", config_name="train")(task)()
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        raise ConfigError(f"{' '.join(arguments)}: a choice is a name, not a number.") from error
    if failed:
        raise failed[0]


@contextmanager
def explained() -> Iterator[None]:
    """What Hydra and OmegaConf raise within becomes a ConfigError of one sentence."""
    try:
        yield
    except OverrideParseException as error:
        raise ConfigError(f"{error.override!r} cannot be read as key=value.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(sentence(error)) from error


def quoted(argument: str) -> str:
    """The argument as Hydra's grammar wants it: resolution=64 as resolution='64' (a choice is a name, and an
    unquoted 64 a number), and data.shards=a/{00000..00004}.tar in quotes (its braces are no mapping)."""
    key, _, value = argument.partition("=")
    if key == "resolution" and re.fullmatch(r"\d+(,\d+)*", value):
        return f"{key}=" + ",".join(f"'{size}'" for size in value.split(","))
    if key in ("data.shards", "data.heldout_shards") and "{" in value and value[0] not in "'\"[":
        return f"{key}='{value}'"
    return argument


def train(composed: DictConfig) -> None:
    """One run, from Hydra's composition on."""
    config = validated(composed)
    # Heavy imports only now: a wrong key is reported at once.
    from t2i import families
    from t2i.training.fit import fit

    from .console import console, say_what_is_logged

    say_what_is_logged()
    result = fit(config, families.load(config.family, "stage").Stage, console)
    rate = f"{result.images_seen} images, {result.seconds:.0f} s of training"
    if result.complete:
        console.print(f"Done: {result.folder} ({rate}).")
    else:
        console.print(
            f"Stopped and saved: {result.folder} ({rate}). To go on: the same command with resume=latest"
        )


def validated(composed: DictConfig) -> RunConfig:
    """The typed configuration, its embedded data in place. Raises ConfigError."""
    from t2i import families
    from t2i.config import parse_run

    from .embedded import with_embedded_data

    values: Any = OmegaConf.to_container(composed, resolve=True)
    config = parse_run(values, families.load(values["family"], "config").Config)
    return with_embedded_data(config)


def sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's messages, which run over many lines, as one sentence."""
    text = str(error)
    if unknown := re.search(r"Could not override '([^']*)'", text):
        return f"{unknown[1]} is not a known key; `t2i train stage=... --cfg job` prints them all."
    if missing := re.search(
        r"Could not find '([^']*)'\s*Available options in '([^']*)':\s*(.*?)\s*Config search path",
        text,
        re.DOTALL,
    ):
        return f"{missing[1]} does not exist; allowed for {missing[2]}: {', '.join(missing[3].split())}."
    if needed := re.search(r"You must specify '([^']*)'.*Available options:\s*(.*)", text, re.DOTALL):
        return f"{needed[1]} is not given; allowed: {', '.join(needed[2].split())}, as in {needed[1]}=..."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
