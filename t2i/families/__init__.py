"""One folder per family of models. Each declares a `Family` record as FAMILY in its `__init__.py`: all that the rest of
the program knows of it."""

from __future__ import annotations

import importlib
import pkgutil

from t2i.errors import ConfigError
from t2i.families.family import Family


def names() -> list[str]:
    """The families that there are: the folders beside this file."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def get(name: object) -> Family:
    """The record of a family. Its name may come from a checkpoint that someone else made, so only folders beside this
    file are ever imported."""
    if name not in names():
        raise ConfigError(f"family is {name!r}; allowed: {', '.join(names())}.")
    return importlib.import_module(f"t2i.families.{name}").FAMILY


def stages_with(part: str) -> list[str]:
    """The stages of those families that have a "codec", "token_codec" or "generator", or that "builds_on" others."""
    records = [get(name) for name in names()]
    return [stage for record in records if getattr(record, part) for stage in record.stages]
