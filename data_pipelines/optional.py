"""Packages that only some jobs need."""

from __future__ import annotations

import importlib
from typing import Any

from t2i.errors import ConfigError


def need(module: str, extra: str) -> Any:
    """The imported module. Raises ConfigError where it is not installed.
    extra: the name in t2i[...] that brings it"""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"This job needs the package {module.partition('.')[0]}; install it with `pip install 't2i[{extra}]'`."
        ) from error
