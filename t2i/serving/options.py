"""The family's own options as fields of a page, from their types."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["choice", "truth", "whole", "number", "text"]


@dataclass(frozen=True)
class Option:
    """choices: of kind "choice"; optional: whether it may be empty, which is None"""

    name: str
    kind: Kind
    value: Any
    choices: tuple[Any, ...] = ()
    optional: bool = False

    def read(self, given: Any) -> Any:
        """What a field of a page holds, as the configuration has it. A whole number may come as 20.0, and a number that
        may be left out as text; what is none is given as it is, for the configuration to refuse."""
        if given in (None, ""):
            return None
        if self.kind in ("whole", "number") and isinstance(given, str):
            with suppress(ValueError):
                return (int if self.kind == "whole" else float)(given)
        if self.kind == "whole" and isinstance(given, float) and given.is_integer():
            return int(given)
        return given

    def takes(self, value: Any) -> bool:
        """Whether a recipe's value, which may come from anybody, is one of this field's."""
        if value is None:
            return self.optional
        if self.kind == "choice":
            return value in self.choices
        if self.kind == "truth":
            return isinstance(value, bool)
        kinds: dict[Kind, Any] = {"whole": int, "number": int | float, "text": str}
        return isinstance(value, kinds[self.kind]) and not isinstance(value, bool)


def options_of(sampling: Any) -> list[Option]:
    """Of a dataclass of sampling options, in its order."""
    hints = typing.get_type_hints(type(sampling))
    return [
        _option(each.name, hints[each.name], getattr(sampling, each.name))
        for each in dataclasses.fields(sampling)
    ]


def _option(name: str, hint: Any, value: Any) -> Option:
    arguments: Sequence[Any] = typing.get_args(hint)
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in arguments
    if optional:
        (hint,) = [each for each in arguments if each is not type(None)]
    if typing.get_origin(hint) is Literal:
        return Option(name, "choice", value, typing.get_args(hint), optional)
    kinds: dict[Any, Kind] = {bool: "truth", int: "whole", float: "number"}
    return Option(name, kinds.get(hint, "text"), value, (), optional)
