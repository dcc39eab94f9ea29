"""What a start of training imports of torchmetrics."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import version

from t2i.training import two_metrics


def test_training_imports_no_metrics_and_they_can_be_had_all_the_same():
    """What Lightning wants of torchmetrics is not torchvision and transformers."""
    code = (
        "import t2i.training.fit, sys, torchmetrics as m\n"
        "print(sorted({'torchvision', 'transformers', 'torchmetrics.functional'} & set(sys.modules)))\n"
        "print(m.Metric is m.MeanMetric.__mro__[2], m.functional.mean_squared_error.__name__, m.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", f"True mean_squared_error {version('torchmetrics')}"]


def test_torchmetrics_of_another_layout_is_imported_whole(tmp_path, monkeypatch):
    (tmp_path / "othermetrics").mkdir()
    (tmp_path / "othermetrics/__init__.py").write_text("class Metric:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(two_metrics, "NAME", "othermetrics")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    two_metrics.install()
    other = importlib.import_module("othermetrics")
    assert other.Metric.__module__ == "othermetrics"
    assert not hasattr(other, "MetricCollection")
