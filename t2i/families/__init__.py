"""One folder per family of models. A family is found by its folder name alone:

config.py     `Config`: its dataclass (imports no torch)
stage.py      `Stage`: the LightningModule that trains it
generator.py  `Generator`: prompts in, pictures out (absent where the stage draws nothing by itself)
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from t2i.errors import ConfigError


def names() -> list[str]:
    """The families that there are: the folders beside this file."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def load(family: str, part: str) -> ModuleType:
    """The module `part` ("config", "stage" or "generator") of a family. The family's name may come from a
    stranger's checkpoint, so only folders beside this file are ever imported."""
    if family not in names():
        raise ConfigError(f"family is {family!r}; allowed: {', '.join(names())}.")
    return importlib.import_module(f"t2i.families.{family}.{part}")
