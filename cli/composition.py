"""Hydra's composition of a run for the verbs that have flags of their own, and its errors as sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from t2i.errors import ConfigError
from t2i.schema import check


def composed_run(
    overrides: list[str], config_dir: str | None = None, needed: str | None = None
) -> dict[str, Any]:
    """What `t2i train` composes, as plain values. Raises ConfigError.

    needed: a group that has to be chosen
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    folders = [Path(str(resources.files("t2i_conf") / "train.yaml")).parent]
    if config_dir is not None:
        check(Path(config_dir).is_dir(), "--config-dir", config_dir, "an existing folder")
        folders.append(Path(config_dir))
        overrides = [*overrides, f"hydra.searchpath=['file://{Path(config_dir).absolute()}']"]
    # The group is optional, so that Hydra would pass over an experiment that does not exist.
    experiments = [
        path.relative_to(folder / "experiment").with_suffix("").as_posix()
        for folder in folders
        for path in sorted(folder.glob("experiment/**/*.yaml"))
    ]
    for key, _, value in (override.partition("=") for override in overrides):
        check(key != "experiment" or value in experiments, key, value, ", ".join(experiments))
    with explained():
        with hydra.initialize_config_module("t2i_conf", version_base="1.3"):
            if needed is not None and not any(each.startswith(f"+{needed}=") for each in overrides):
                choices = GlobalHydra.instance().config_loader().get_group_options(needed)
                raise ConfigError(
                    f"{needed} is not given; allowed: {', '.join(choices)}, as in {needed}={choices[0]}."
                )
            composed = hydra.compose("train", [quoted(override) for override in overrides])
        values: Any = OmegaConf.to_container(composed, resolve=True)
    return values


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
    if (
        key.endswith(("data.shards", ".heldout_shards", ".shards"))
        and "{" in value
        and value[0] not in "'\"["
    ):
        return f"{key}='{value}'"
    return argument


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
