"""Packages that only some jobs need."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, Literal

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


def arrow_file(path: Path, mode: Literal["rb", "wb"] = "rb") -> Any:
    """pyarrow's open file, for `with`. A name as text it would take for a URL where it looks like one, and refuse where
    it is not UTF-8."""
    return need("pyarrow", "data").OSFile(os.fsencode(path), mode)
