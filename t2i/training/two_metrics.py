"""`import torchmetrics` without its metrics, for Lightning.

Lightning wants two classes of torchmetrics, which imports all its metrics and with them torchvision, transformers and
scipy.signal: two seconds and 1,300 modules at each start of each process of a run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAME = "torchmetrics"


class _TwoClasses(importlib.abc.Loader):
    """Runs the package's own code when anything but the two classes is asked of it, or at once where they are not to
    be had alone."""

    def __init__(self, whole: importlib.abc.Loader) -> None:
        self.whole = whole

    def exec_module(self, module: ModuleType) -> None:
        def of_the_whole(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            self._load(module)
            return getattr(module, name)

        module.__getattr__ = of_the_whole  # type: ignore[method-assign]
        vars(module)["_logger"] = logging.getLogger(NAME)  # for which its modules ask
        try:
            version = importlib.import_module(f"{NAME}.__about__").__version__
            importlib.import_module(f"{NAME}.utilities")  # first, or its parts import each other in a circle
            found = {
                "__version__": version,
                "Metric": importlib.import_module(f"{NAME}.metric").Metric,
                "MetricCollection": importlib.import_module(f"{NAME}.collections").MetricCollection,
            }
        except (ImportError, AttributeError):  # of a version that is laid out otherwise
            self._load(module)
        else:
            vars(module).update(found)

    def _load(self, module: ModuleType) -> None:
        vars(module).pop("__getattr__", None)
        self.whole.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _TwoClasses(spec.loader)
        return spec


def install() -> None:
    """For imports of torchmetrics that are to come."""
    sys.meta_path.insert(0, _Finder())
