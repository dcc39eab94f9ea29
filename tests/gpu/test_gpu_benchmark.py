"""`make bench-gpu`, as far as it runs where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The module benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


@pytest.mark.slow
def test_the_command_runs_from_end_to_end(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--minutes", "8", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["left_out"] == []
    assert found["tests"].keys() == {"skipped"}
    points = [(p["size_px"], p["way"], p["batch"]) for p in found["training"]]
    assert {*points} >= {(64, "eager", 1), (64, "eager", 2), (128, "eager", 1), (128, "eager", 2)}
    assert [way for _, way, _ in points[4:]] == ["cudnn.benchmark", "compiled", "compiled"]
    assert all(p["images_per_second"] > 0 and p["planned_gib"] > 0 for p in found["training"])
    drawn = [(row["who"], row["batch"]) for row in found["sampling"]]
    assert drawn == [
        *(("t2i", 1), ("t2i", 2), ("diffusers", 1), ("diffusers", 2)),
        *(("t2i, compiled", 2), ("diffusers, compiled", 2)),
    ]
    for point in found["training"]:
        assert f"| {point['batch']} | {point['images_per_second']:.1f} |" in done.stdout


class Subject:
    """In the place of the networks: eager, batches of 2 are the fastest."""

    def train(self, size_px, batches, way, found):
        from gpu_sd1 import Trained

        for batch in batches:
            found(Trained(size_px, way, batch, 10.0 + batch + size_px, 0.4, 3.0, 2.5))

    def time_t2i(self, batch, size_px, compiled=False):
        return 0.25

    def time_diffusers(self, batches, size_px, compiled):
        if compiled:
            raise RuntimeError("no kernel")
        return dict.fromkeys(batches, 0.5)


def test_each_part_is_measured_and_told(gpu):
    budget, results = gpu.Budget(60.0), {"device": "A GPU", "torch": "2", "pictures": "512 px"}
    gpu.measure(Subject(), budget, True, results)
    assert budget.left_out == ["diffusers draws, compiled: RuntimeError: no kernel"]
    points = [(p["size_px"], p["way"], p["batch"]) for p in results["training"]]
    eager = [(size, "eager", batch) for size in (64, 128) for batch in (1, 2)]
    assert points == [*eager, (64, "cudnn.benchmark", 2), (64, "compiled", 2), (128, "compiled", 2)]
    from gpu_sd1 import Trained

    results |= {"left_out": budget.left_out, "seconds": 50.0, "tests": {"passed": 17}}
    text = gpu.markdown(results, [Trained(**row) for row in results["training"]])
    assert "GPU tests: 17 passed." in text
    assert "| 64 px, eager | 2 | 76.0 | - | 40.0% | 3.0 GiB | 2.5 GiB |" in text
    assert "| t2i | 2 | 0.250 | - |\n| diffusers | 1 | 0.500 | - |" in text
    assert text.endswith("Left out (1): diffusers draws, compiled: RuntimeError: no kernel.")
    point = Trained(256, "compiled", 128, 600.0, None, None, 70.0)
    assert gpu.training_row(point) == "| 256 px, compiled | 128 | 600.0 | 594 then 817 | - | - | 70.0 GiB |"


def test_what_does_not_fit_into_the_time_is_left_out_and_said(gpu):
    budget = gpu.Budget(10.0)
    with budget.part("long", 20.0) as go:
        assert not go
    with budget.part("short", 1.0) as go:
        assert go
    assert budget.left_out == ["long: 10 s were left, it takes about 20"]


def test_a_part_ends_with_the_time_and_the_next_is_left_out(gpu):
    budget = gpu.Budget(0.2)
    with budget.part("endless", 0.1):
        time.sleep(30)
    with budget.part("next", 0.1):
        pass
    assert [sentence.split(" ")[0] for sentence in budget.left_out] == ["endless:", "next:"]
    assert "not done after 0 s" in budget.left_out[0]


def test_a_part_that_fails_does_not_end_the_others(gpu):
    budget = gpu.Budget(10.0)
    with budget.part("broken", 0.0):
        raise ValueError("no\nsuch thing")
    assert budget.left_out == ["broken: ValueError: no such thing"]


def test_of_gpu_tests_that_take_too_long_those_that_ended_are_told(gpu):
    said = "tests/gpu/a.py::test_a[x-1] PASSED  [ 3%]\ntests/gpu/a.py::test_b FAILED [ 6%]\ntests/gpu/a.py::test_c "
    assert gpu.counted(said) == {"passed": 1, "failed": 1}
    results: dict = {}
    with pytest.raises(RuntimeError, match="not all had run after 0 s"):
        gpu.gpu_tests(0.0, results)
    assert results["tests"] == {}
