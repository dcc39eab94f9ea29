"""metrics.csv: late columns, and what a resumed run keeps."""

from __future__ import annotations

import csv
from pathlib import Path

from t2i.training.loggers import MetricsCSV


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_can_be_read_while_the_run_goes_on(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"loss": step / 8}, step)
        assert read(tmp_path)[-1] == {"step": str(step), "loss": str(step / 8)}


def test_a_late_metric_gets_its_column_and_earlier_rows_stay(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5, "kl": 2.0}, 1)
    logger.log_metrics({"loss": 0.25, "generator": -1.0}, 2)
    logger.log_metrics({"loss": 0.125}, 3)
    assert read(tmp_path) == [
        {"step": "1", "loss": "0.5", "kl": "2.0", "generator": ""},
        {"step": "2", "loss": "0.25", "kl": "", "generator": "-1.0"},
        {"step": "3", "loss": "0.125", "kl": "", "generator": ""},
    ]


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"loss": float(step)}, step)
    resumed = MetricsCSV(tmp_path, from_step=20)
    assert [row["step"] for row in read(tmp_path)] == ["10", "20"]
    resumed.log_metrics({"loss": 31.0}, 30)
    resumed.log_metrics({"loss": 41.0, "generator": 1.0}, 40)
    assert [(row["step"], row["loss"], row["generator"]) for row in read(tmp_path)] == [
        ("10", "10.0", ""),
        ("20", "20.0", ""),
        ("30", "31.0", ""),
        ("40", "41.0", "1.0"),
    ]


def test_a_run_resumed_before_anything_was_logged(tmp_path):
    MetricsCSV(tmp_path).log_metrics({"loss": 1.0}, 10)
    resumed = MetricsCSV(tmp_path, from_step=5)
    assert read(tmp_path) == []
    resumed.log_metrics({"loss": 2.0}, 6)
    assert read(tmp_path) == [{"step": "6", "loss": "2.0"}]
    MetricsCSV(tmp_path, from_step=6)
    assert read(tmp_path) == [{"step": "6", "loss": "2.0"}]
