"""`t2i train`: Hydra composes the arguments, t2i.config validates, t2i.training trains."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t2i.errors import ConfigError, UserError

from .composition import explained, quoted, sentence
from .train_help import help_text

if TYPE_CHECKING:
    from t2i.config import RunConfig


def run(arguments: list[str]) -> None:
    """Composes and trains; `--cfg job`, `--multirun` and `--config-dir` are Hydra's own."""
    if {"-h", "--help"} & set(arguments):
        print(help_text(), end="")
        return
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
    values: Any = OmegaConf.to_container(composed, resolve=True)
    return typed_run(values)


def typed_run(values: dict[str, Any]) -> RunConfig:
    """The same of plain values."""
    from t2i import families
    from t2i.config import parse_run

    from .embedded import with_embedded_data

    config = parse_run(values, families.load(values["family"], "config").Config)
    return with_embedded_data(config)
