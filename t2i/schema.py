"""The one place where a composed mapping becomes a dataclass, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from t2i.errors import ConfigError, shortened

T = TypeVar("T")
MAX_NUMBER = 1_000_000  # of steps, and of pictures per prompt
MAX_SCALE = 1e30  # of what numbers are multiplied by while pictures are drawn: single precision ends at 3e38
MISSING = "???"  # how a configuration file marks a value that has to be given


class Upgraded:
    """What a dataclass derives from whose values older versions wrote otherwise."""

    @classmethod
    def upgraded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """A mapping that an older version may have written, with the keys and values of today."""
        return dict(values)


def check(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises ConfigError unless `condition`: "data.batch_size is 0; allowed: 1 or more."."""
    if not condition:
        raise ConfigError(f"{key} is {shortened(repr(value))}; allowed: {allowed}.")


def check_number(key: str, value: int | None, most: int = MAX_NUMBER) -> None:
    """Raises ConfigError for one that is not from 1 to `most`."""
    allowed = f"1 to {most:,}" if value and value > most else "1 or more"
    check(value is None or 1 <= value <= most, key, value, allowed)


def check_scale(key: str, value: float) -> None:
    """Raises ConfigError for one that is not from 0 to `MAX_SCALE`, NaN included."""
    check(0 <= value <= MAX_SCALE, key, value, f"0 to {MAX_SCALE:g}" if value > MAX_SCALE else "0 or more")


def nearest(key: str, allowed: Iterable[str], path: str = "") -> str:
    """The end of a sentence about a key that there is not: the one that was meant, or all that are allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {path}{near[0]}?" if near else f"allowed: {', '.join(names)}."


def parse(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A dataclass from a plain mapping, strictly: unknown keys, missing keys and wrong types raise
    ConfigError with the full dotted key. What an older version wrote, the dataclass's own `upgraded` reads."""
    if issubclass(cls, Upgraded):
        values = cls.upgraded(values)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{path}{key} is not a known key; {nearest(str(key), fields, path)}")
    kwargs = {}
    for name, spec in fields.items():
        if name in values and values[name] != MISSING:
            kwargs[name] = _convert(hints[name], values[name], path + name)
        elif name in values or (
            spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        ):
            raise ConfigError(f"{path}{name} is missing; it needs a value.")
    return cls(**kwargs)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain mapping that `parse` would turn into `config` again."""
    return dataclasses.asdict(config)


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        if any(dataclasses.is_dataclass(a) for a in rest):
            return _convert_named(rest, value, key)
        if len(rest) == 1:
            return _convert(rest[0], value, key)
        fitting = [o for o in rest if isinstance(value, typing.get_origin(o) or o)]
        check(bool(fitting), key, value, " or ".join(map(_described, rest)))
        return _convert(fitting[0], value, key)
    if origin is Literal:
        check(value in args, key, value, ", ".join(str(a) or "''" for a in args))
        return value
    if origin in (list, tuple):
        check(isinstance(value, list | tuple), key, value, "a list")
        items = [_convert(args[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin is dict:
        check(isinstance(value, Mapping), key, value, "a mapping")
        return {k: _convert(args[1], v, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        check(isinstance(value, Mapping), key, value, "a mapping")
        return parse(typing.cast(type, hint), value, key + ".")
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            check(False, key, value, "a number up to 1e308")
    if hint is Any:
        return value
    ok = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    check(ok, key, value, _described(hint))
    check(hint is not str or "\0" not in value, key, value, "text without NUL characters, which no name has")
    return value


def _described(hint: Any) -> str:
    """A type in the words of a configuration file."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    return names.get(typing.get_origin(hint) or hint, str(hint))


def _convert_named(options: list[Any], value: Any, key: str) -> Any:
    """One of several dataclasses, told apart by the one value that each allows for its field `name`."""
    check(isinstance(value, Mapping), key, value, "a mapping")
    if len(options) == 1:
        return parse(options[0], value, key + ".")
    by_name = {typing.get_args(typing.get_type_hints(o)["name"])[0]: o for o in options}
    check(value.get("name") in by_name, f"{key}.name", value.get("name"), ", ".join(by_name))
    return parse(by_name[value["name"]], value, key + ".")


def is_unicode(text: str) -> bool:
    """False for halves of pairs of surrogates, which no file can hold: what was typed in another encoding has them in
    Python, and JSON can spell them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
