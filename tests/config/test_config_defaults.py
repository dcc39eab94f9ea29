"""A default stands in one place: what the groups of conf/ give has no other default in the dataclass."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from t2i import families
from t2i.config import OptimizerConfig, RunConfig, TextConfig
from t2i.errors import ConfigError
from t2i.nn.dit_config import DiTConfig
from t2i.schema import parse

CONF = Path(__file__).parents[2] / "conf"
TOP = [RunConfig, *(families.get(name).load_config() for name in families.names())]
GROUPS = sorted(
    {path.parent.name for path in CONF.glob("*/*.yaml")}
    & {f.name for c in TOP for f in dataclasses.fields(c)}
)
# Runs are resumed whose config.yaml was written before there were these keys: the default is what they had.
CAME_LATER = {
    "AdversarialConfig.adaptive",
    *("DiTConfig.refiner_depth", "DiTConfig.refiner_patch_size"),
    *("ObjectiveConfig.max_snr", "ObjectiveConfig.edge_weight"),
    "MuseConfig.code_vectors",
}


def dataclasses_of(hint: Any) -> Iterator[type]:
    """Those that a field may hold."""
    for part in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(part):
            yield typing.cast(type, part)


def named(cls: type, values: Mapping[str, Any]) -> bool:
    """Whether the entry `name` is one of the names of `cls`."""
    hint = typing.get_type_hints(cls).get("name")
    return hint is None or values.get("name") in typing.get_args(hint)


def differing(cls: type, values: Mapping[str, Any]) -> Iterator[str]:
    """Keys whose value in conf/ is not the default that the dataclass has for them. A reference is any value. What is
    refused without the key has no default for it, though others of the group may do without."""
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is dataclasses.MISSING or field.name not in values:
            continue
        value = values[field.name]
        same = value == (list(default) if isinstance(default, tuple) else default)
        if not same and not needed(cls, values, field.name):
            yield f"{cls.__name__}.{field.name}"


def needed(cls: type, values: Mapping[str, Any], key: str) -> bool:
    """Whether `cls` takes these values, and refuses them without this key."""
    plain = {name: value for name, value in values.items() if "${" not in str(value)}
    try:
        parse(cls, plain)
    except ConfigError:
        return False
    del plain[key]
    try:
        parse(cls, plain)
    except ConfigError:
        return True
    return False


def options(group: str) -> Iterator[dict[str, Any]]:
    for path in sorted((CONF / group).glob("*.yaml")):
        if "@package _global_" not in path.read_text():
            yield typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))


def found_in(group: str) -> set[str]:
    found: set[str] = set()
    for top in TOP:
        hint = typing.get_type_hints(top).get(group)
        for values in options(group):
            for cls in dataclasses_of(hint):
                if named(cls, values) and values.keys() <= {f.name for f in dataclasses.fields(cls)}:
                    found.update(differing(cls, values))
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_no_value_of_a_group_has_another_default_in_the_code(group):
    assert found_in(group) <= CAME_LATER


def test_the_exceptions_are_needed():
    assert set().union(*(found_in(group) for group in GROUPS)) == CAME_LATER


def test_the_comparison_sees_what_differs():
    assert {
        "optimizer",
        "text",
        "data",
        "denoiser",
        "backbone",
        "adversarial",
        "perceptual",
        "ema",
        "logger",
    } <= set(GROUPS)
    assert list(
        differing(OptimizerConfig, {"muon_scale": 3.0, "betas": [0.9, 0.999], "warmup_images": 7})
    ) == ["OptimizerConfig.muon_scale"]
    assert list(differing(DiTConfig, {"width": "${a}", "patch_size": 4})) == ["DiTConfig.width"]
    learned = {"name": "learned", "max_tokens": 8, "width": 8, "depth": 1, "heads": 1}
    assert list(differing(TextConfig, learned)) == []
    assert list(differing(TextConfig, learned | {"allow_download": True})) == ["TextConfig.allow_download"]
