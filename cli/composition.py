"""Hydra's composition of a run for the verbs that have flags of their own, and its errors as sentences."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml.error import MarkedYAMLError
from yaml.reader import ReaderError

from t2i.config import RECIPE, parse_model
from t2i.errors import ConfigError
from t2i.schema import check, nearest

from .train_help import groups

COMMA = r",(?![^{}]*\})"  # outside of braces
# Keys whose values are names and paths: there "5" and "true" are text, too.
TEXTS = {
    *("name", "runs_dir", "init_from", "resume", "builds_on.codec", "builds_on.low"),
    *(
        "text.model",
        "text.weights",
        "perceptual.weights",
        "data.encoded",
        "data.shards",
        "data.heldout_shards",
    ),
}


def composed_run(
    overrides: list[str],
    config_dir: str | None = None,
    needed: str | None = None,
    config_name: str | None = "train",
) -> dict[str, Any]:
    """What `t2i train` composes, as plain values. Raises ConfigError.

    needed: a group that has to be chosen
    config_name: the file in conf/ to begin with; None begins with nothing: +group=choice then gives that group alone
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    check_own_cluster(overrides, config_dir)
    overrides = [quoted(override) for override in overrides] + _searched(config_dir)
    with explained(config_dir):
        with hydra.initialize_config_module("t2i_conf", version_base="1.3"):
            if needed is not None and not any(each.startswith(f"{needed}=") for each in overrides):
                choices = GlobalHydra.instance().config_loader().get_group_options(needed)
                raise ConfigError(
                    f"{needed} is not given; allowed: {', '.join(choices)}, as in {needed}={choices[0]}."
                )
            try:
                composed = hydra.compose(config_name, overrides)
            except ValueError as error:
                if "Config group override" not in str(error):
                    raise
                raise ConfigError(f"{' '.join(overrides)}: a choice is a name, not a number.") from error
        values = checked(composed, overrides)
    return values | {"cluster": launched(composed)[1]} if needed == "cluster" else values


def _searched(config_dir: str | None) -> list[str]:
    """What has Hydra look into a folder of one's own too. Raises ConfigError where there is none."""
    if config_dir is None:
        return []
    check(Path(config_dir).is_dir(), "--config-dir", config_dir, "an existing folder")
    return [f"hydra.searchpath=[{_as_text(f'file://{Path(config_dir).absolute()}')}]"]


def check_own_cluster(overrides: list[str], config_dir: str | None) -> None:
    """Raises ConfigError where the file that cluster=NAME means in a folder of one's own has no keys: Hydra would name
    no file, or go on without it."""
    from t2i.launch.slurm import SlurmConfig
    from t2i.planning.config import ClusterConfig

    names = [each.removeprefix("cluster=") for each in overrides if each.startswith("cluster=")]
    for path in (Path(config_dir or "", "cluster", f"{name}.yaml") for name in names):
        if config_dir is None or not path.is_file():
            continue
        with explained(config_dir):
            found: Any = OmegaConf.to_container(OmegaConf.load(path))
        check(isinstance(found, dict) and len(found) > 0, str(path), found, _keys(ClusterConfig))
        slurm = found.get("slurm")
        check(not isinstance(slurm, list), f"slurm in {path}", slurm, _keys(SlurmConfig))


def _keys(config: Any) -> str:
    names = sorted(field.name for field in dataclasses.fields(config))
    return f"a mapping with the keys {', '.join(names)}"


def cluster_of_overrides(overrides: list[str], config_dir: str | None = None) -> dict[str, Any]:
    """The cluster that launch=slurm, cluster= and cluster.KEY= name, for verbs that compose no run. Raises
    ConfigError."""
    import hydra

    check_own_cluster(overrides, config_dir)
    given = [quoted(each) for each in overrides] + _searched(config_dir)
    with explained(config_dir), hydra.initialize_config_module("t2i_conf", version_base="1.3"):
        return launched(hydra.compose("launch", given))[1]


def launched(composed: DictConfig) -> tuple[str, dict[str, Any]]:
    """How a composition is to be launched, and on which cluster: empty where that is not given."""
    cluster: Any = OmegaConf.to_container(composed.get("cluster") or OmegaConf.create({}), resolve=True)
    return str(composed.get("launch", "local")), {} if cluster.keys() == {"slurm"} else cluster


def checked(composed: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """The plain values of a run, interpolations resolved. Raises ConfigError for what no stage can mean.

    overrides: key=value as the command line has them
    """
    values: Any = OmegaConf.to_container(composed, resolve=True)
    check_experiment(values)
    check_recipe(composed, overrides)
    check_unused(values, overrides)
    check_pipes(values, overrides)
    for key in ("launch", "cluster"):  # see `launched`
        values.pop(key, None)
    return values


def check_recipe(composed: DictConfig, overrides: list[str]) -> None:
    """Raises ConfigError where a key of the resolution's recipe is given and nothing in the composition refers to
    it: it would change nothing."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    referred = set(_texts(OmegaConf.to_container(composed, resolve=False)))
    for given in OverridesParser.create().parse_overrides(overrides):
        group, _, key = given.key_or_group.partition(".")
        if group == "resolution" and key in RECIPE and f"${{resolution.{key}}}" not in referred:
            raise ConfigError(
                f"{given.key_or_group}={given.value()} would change nothing: nothing in this run refers to it; "
                f"`t2i train stage={composed.get('stage')} --cfg job` prints the keys that count."
            )


def check_unused(values: dict[str, Any], overrides: list[str]) -> None:
    """Raises ConfigError where a key of the model is given that changes nothing beside the others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from t2i import families

    if "family" not in values:
        return
    config = families.get(values["family"]).load_config()
    unused = parse_model(config.upgraded(values), config).unused()
    for given in OverridesParser.create().parse_overrides(overrides):
        if given.key_or_group in unused and not given.is_delete():
            raise ConfigError(
                f"{given.key_or_group}={given.value()} would change nothing: it counts with "
                f"{unused[given.key_or_group]}."
            )


def check_experiment(values: dict[str, Any]) -> None:
    """Raises ConfigError where the file of an experiment says nothing of the run itself."""
    allowed = "a file with keys, whose first line is '# @package _global_'"
    check("experiment" not in values, "experiment", values.get("experiment"), allowed)


def check_pipes(values: dict[str, Any], overrides: list[str]) -> None:
    """Raises ConfigError where a `pipe:` command among the shards does not stand in the overrides, which are what the
    command line itself says, but in a file of configuration."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from t2i.data.sources import expand

    typed = {
        text for each in OverridesParser.create().parse_overrides(overrides) for text in _texts(each.value())
    }
    for text in _texts(values.get("data")):
        if "pipe:" in text and text not in typed:
            commands = [url for url in expand(text, "data") if url.startswith("pipe:")]
            check(
                not commands, "data", commands[0] if commands else "", "commands that the command line names"
            )


def _texts(value: Any) -> Iterator[str]:
    """All the text in lists and mappings."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
    elif hasattr(value, "text"):  # Hydra's quoted string
        yield value.text
    elif isinstance(value, str):
        yield value


@contextmanager
def explained(config_dir: str | None = None) -> Iterator[None]:
    """What Hydra and OmegaConf raise within becomes a ConfigError of one sentence.

    config_dir: of configuration beside ours
    """
    try:
        yield
    except OverrideParseException as error:
        raise ConfigError(f"{error.override!r} cannot be read as key=value.") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else "a file of configuration"
        raise ConfigError(f"{place}, cannot be read as YAML: {error.problem}.") from error
    except (UnicodeDecodeError, ReaderError) as error:
        raise ConfigError(
            f"A file of configuration in {config_dir} cannot be read as text in UTF-8: {error.reason}."
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        if unknown := re.search(r"Could not find 'experiment/([^']*)'", str(error)):
            known, folder = experiments(config_dir), unknown[1].partition("/")[0]
            near = [name for name in known if name.startswith(f"{folder}/")]
            check(False, "experiment", unknown[1], ", ".join(near or known))
        raise ConfigError(sentence(error)) from error


def experiments(config_dir: str | None = None) -> list[str]:
    """Those of ours, and then those in a folder of the user's own."""
    own = Path(config_dir) / "experiment" if config_dir is not None else None
    names = (
        [path.relative_to(own).with_suffix("").as_posix() for path in sorted(own.rglob("*.yaml"))]
        if own
        else []
    )
    return [*groups()["experiment"], *names]


def quoted(argument: str, sweep: bool = False) -> str:
    """The argument as Hydra's grammar wants it: resolution=64 as resolution='64' (a choice is a name, and an
    unquoted 64 a number), and a value that the grammar cannot read, such as data.shards=a/{00000..00004}.tar or a
    name with an apostrophe, as text.

    sweep: commas may separate values
    """
    key, equals, value = argument.partition("=")
    if key.startswith("-") or not equals:
        return argument
    if key == "resolution" and re.fullmatch(r"\d+(,\d+)*", value):
        return f"{key}=" + ",".join(f"'{size}'" for size in value.split(","))
    parts = re.split(COMMA, value) if sweep else [value]
    if key.lstrip("+") in TEXTS and any(map(_is_number, parts)):
        return f"{key}=" + ",".join(
            _in_quotes(part) if _is_number(part) else _as_text(part) for part in parts
        )
    if _readable(value, sweep) or not _readable("", key=key):
        return argument
    if in_list := re.fullmatch(r"\[([^\[\]]*)\]", value):
        return f"{key}=[{','.join(map(_as_text, re.split(COMMA, in_list[1])))}]"
    if value.count("[") != value.count("]"):
        return argument  # an unfinished list
    return f"{key}=" + ",".join(map(_as_text, parts))


def _readable(value: str, sweep: bool = False, key: str = "name") -> bool:
    """Whether Hydra's grammar takes key=value, as one value unless `sweep`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return False
    return sweep or not parsed.is_sweep_override()


def _is_number(value: str) -> bool:
    """Whether Hydra's grammar makes a number or a truth value of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return _readable(value) and isinstance(
        OverridesParser.create().parse_override(f"name={value}").value(), int | float
    )


def _as_text(value: str) -> str:
    """In quotes, unless the grammar reads it without, in a list too."""
    plain = _readable(value) and _readable(f"[{value}]")
    return value if plain else _in_quotes(value)


def _in_quotes(value: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=value, quote=Quote.single).with_quotes()


def sentence(error: Exception) -> str:
    """Hydra's and OmegaConf's messages, which run over many lines, as one sentence."""
    text = str(error)
    if unknown := re.search(r"Could not override '([^']*)'", text):
        return _unknown(unknown[1], error.__cause__)
    if missing := re.search(
        r"Could not find '([^']*)'\s*Available options in '([^']*)':\s*(.*?)\s*Config search path",
        text,
        re.DOTALL,
    ):
        return f"{missing[1]} does not exist; allowed for {missing[2]}: {', '.join(missing[3].split())}."
    if needed := re.search(r"You must specify '([^']*)'.*Available options:\s*(.*)", text, re.DOTALL):
        return f"{needed[1]} is not given; allowed: {', '.join(needed[2].split())}, as in {needed[1]}=..."
    if key := getattr(error, "full_key", None):
        return f"{key}: {text.splitlines()[0].strip()}."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _unknown(key: str, cause: Any) -> str:
    """cause: OmegaConf's error, which knows where it looked"""
    found, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    keys = [str(each) for each in parent if each != "hydra"] if isinstance(parent, DictConfig) else []
    if not (found and keys):
        return f"{key} is not a known key; `t2i train stage=... --cfg job` prints them all."
    path, _, last = found.rpartition(".")
    where = "" if found == key else f": there is no {found}"
    return f"{key} is not a known key{where}; {nearest(last, keys, f'{path}.' if path else '')}"
