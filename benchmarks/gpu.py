"""What one GPU does: the GPU tests, Stable Diffusion 1's train step and pictures, and memory against the plan.

    make bench-gpu                       # or: python benchmarks/gpu.py [--minutes 9] [--out bench_gpu.json]
    python benchmarks/gpu.py --toy       # the same on the CPU, with small networks

Prints rows for docs/benchmarks.md and writes them as JSON. What does not fit into the minutes is left out, and said.
Weights are random and pictures are not read, so that no network and no data are needed. Where packages cannot be
fetched, carry them: on a machine with a network, in this folder,

    python3 -m pip wheel --no-deps -w wheels . hydra-core==1.3.8 omegaconf==2.3.0 antlr4-python3-runtime==4.9.3 \\
        webdataset open_clip_torch ftfy wcwidth diffusers importlib_metadata braceexpand lightning lightning-utilities

and on the one with the GPU, which has torch, torchvision, transformers, timm and pytest already,

    python3 -m pip install --no-index --no-deps wheels/*.whl && make bench-gpu

The train step is that of `t2i train`: its own stage, optimizer, average, precision and Lightning's loop. Latents are
cached, captions are encoded in each step; batches are ready in the host's memory, so that reading is left out. MFU
counts the UNet's FLOPs alone, over the data sheet's peak in bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_sd1 import Subject, Trained

REPOSITORY = Path(__file__).parents[1]
# On an H100: images/s that are to be reached first, and then; seconds a picture at batch 16.
GOALS = {256: (594, 817), 512: (137, 183)}
GOAL_PICTURE_S = 0.25
SIZES = (256, 512)
BATCHES = {256: [32, 64, 128, 192, 256, 320, 384], 512: [8, 16, 32, 48, 64, 80, 96]}
PICTURES = (1, 16)
TESTS_S = 150.0


class OutOfTimeError(Exception):
    """The minutes are over."""


class Budget:
    """So many seconds from now on. left_out: what they did not suffice for, a sentence each"""

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds
        self.left_out: list[str] = []

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    @contextmanager
    def part(self, name: str, needs_s: float) -> Iterator[bool]:
        """Gives whether to do it: not where less than needs_s is left. What is not done when the time is over, or
        fails, is left out from there on."""
        began, left = time.monotonic(), self.left_s
        if left < needs_s:
            self.left_out.append(f"{name}: {left:.0f} s were left, it takes about {needs_s:.0f}")
            yield False
            return

        def ring(*_: Any) -> None:
            raise OutOfTimeError

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            yield True
        except OutOfTimeError:
            self.left_out.append(f"{name}: not done after {time.monotonic() - began:.0f} s")
        except Exception as error:  # the other parts can still be measured
            reason = " ".join(str(error).split())[:300]
            self.left_out.append(f"{name}: {type(error).__name__}: {reason}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def gpu_tests(timeout_s: float, results: dict[str, Any]) -> None:
    """Puts under "tests" how many of the tests that `make test-gpu` runs passed, failed and were skipped, also of those
    that ended before the time was over. Raises RuntimeError where they did not all run."""
    files = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    late = False
    with tempfile.TemporaryFile("w+") as output:
        try:
            state = subprocess.run(
                command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s
            ).returncode
        except subprocess.TimeoutExpired:
            late, state = True, 1
        output.seek(0)
        said = output.read()
    results["tests"] = counted(said)
    if state != 0:
        print(said, file=sys.stderr)
    if late:
        raise RuntimeError(f"not all had run after {timeout_s:.0f} s")
    if state not in (0, 1):
        raise RuntimeError(f"pytest: {said.strip()[-300:]}")


def counted(said: str) -> dict[str, int]:
    """How many tests ended in which way, by what `pytest -v` has written so far."""
    words = re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR)\b", said, re.MULTILINE)
    return {word.lower(): words.count(word) for word in dict.fromkeys(words)}


def measure(subject: Subject, budget: Budget, toy: bool, results: dict[str, Any]) -> None:
    """Everything but the tests, the most wanted first."""
    sizes = (64, 128) if toy else SIZES
    batches = {size: [1, 2] for size in sizes} if toy else BATCHES
    pictures = (1, 2) if toy else PICTURES
    picture_px = 64 if toy else 512
    points: list[Trained] = []
    results["training"], results["sampling"] = [], []

    def found(point: Trained) -> None:
        points.append(point)
        results["training"].append(dataclasses.asdict(point))
        print(training_row(point), file=sys.stderr, flush=True)

    def drawn(who: str, batch: int, seconds: float) -> None:
        results["sampling"].append({"who": who, "batch": batch, "seconds_per_picture": seconds})

    for size in sizes:
        with budget.part(f"training at {size} px", 0 if toy else 30) as go:
            if go:
                subject.train(size, batches[size], "eager", found)
    for batch in pictures:
        with budget.part(f"t2i draws {batch}", 0 if toy else 12) as go:
            if go:
                drawn("t2i", batch, subject.time_t2i(batch, picture_px))
    with budget.part("diffusers draws", 0 if toy else 40) as go:
        if go:
            for batch, seconds in subject.time_diffusers(list(pictures), picture_px, compiled=False).items():
                drawn("diffusers", batch, seconds)
    for way, size in (("cudnn.benchmark", sizes[0]), *(("compiled", size) for size in sizes)):
        with budget.part(
            f"training at {size} px, {way}", 0 if toy else 20 if way != "compiled" else 60
        ) as go:
            if go:
                rates = {p.batch: p.images_per_second for p in points if p.size_px == size}
                best = max(rates, key=rates.__getitem__) if rates else batches[size][0]
                subject.train(size, [best], way, found)
    with budget.part("t2i draws, compiled", 0 if toy else 60) as go:
        if go:
            drawn("t2i, compiled", pictures[-1], subject.time_t2i(pictures[-1], picture_px, compiled=True))
    with budget.part("diffusers draws, compiled", 0 if toy else 60) as go:
        if go:
            for batch, seconds in subject.time_diffusers(pictures[-1:], picture_px, compiled=True).items():
                drawn("diffusers, compiled", batch, seconds)


def training_row(point: Trained) -> str:
    """A row of the Markdown table."""
    goals = " then ".join(map(str, GOALS.get(point.size_px, ()))) or "-"
    mfu = "-" if point.mfu is None else f"{point.mfu:.1%}"
    peak = "-" if point.peak_gib is None else f"{point.peak_gib:.1f} GiB"
    way = f"{point.size_px} px, {point.way}"
    rate = f"{point.images_per_second:.1f}"
    return f"| {way} | {point.batch} | {rate} | {goals} | {mfu} | {peak} | {point.planned_gib:.1f} GiB |"


def markdown(results: dict[str, Any], points: list[Trained]) -> str:
    """What goes into docs/benchmarks.md."""
    tests = ", ".join(f"{number} {word}" for word, number in results.get("tests", {}).items()) or "not run"
    lines = [
        f"`make bench-gpu`, {results['device']}, torch {results['torch']}, {results['seconds']:.0f} s in all. GPU "
        f"tests: {tests}.",
        "",
        "| SD1's UNet, latents cached, EMA | batch | images/s | goal | MFU | peak memory | by `t2i plan` |",
        "|---|---|---|---|---|---|---|",
        *map(training_row, points),
        "",
        f"| {results['pictures']} | batch | s a picture | goal |",
        "|---|---|---|---|",
    ]
    for row in results["sampling"]:
        goal = f"{GOAL_PICTURE_S} s" if row["batch"] == PICTURES[-1] else "-"
        lines.append(f"| {row['who']} | {row['batch']} | {row['seconds_per_picture']:.3f} | {goal} |")
    if results["left_out"]:
        lines += ["", f"Left out ({len(results['left_out'])}): {'; '.join(results['left_out'])}."]
    return "\n".join(lines)


def run(budget: Budget, toy: bool) -> tuple[dict[str, Any], list[Trained]]:
    """The results, and the points of training among them."""
    results: dict[str, Any] = {"training": [], "sampling": []}
    with budget.part("the GPU tests", 0) as go:
        if go:
            gpu_tests(min(TESTS_S, budget.left_s), results)
    import torch
    from gpu_sd1 import Subject, Trained

    device = platform.machine() if toy else torch.cuda.get_device_name()
    size, steps = ("64 px, 2 steps", "toy size") if toy else ("512 px, 50 steps of DDIM", "guidance 7.5")
    results |= {"device": device, "torch": torch.__version__, "pictures": f"{size}, {steps}"}
    with tempfile.TemporaryDirectory() as folder, budget.part("measuring", 0) as go:
        if go:
            measure(Subject(Path(folder), toy), budget, toy, results)
    return results, [Trained(**row) for row in results["training"]]


def main() -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing more is measured")
    parser.add_argument("--out", type=Path, default=Path("bench_gpu.json"))
    parser.add_argument(
        "--toy", action="store_true", help="small networks, on the CPU, where nothing is compiled"
    )
    options = parser.parse_args()
    began = time.monotonic()
    budget = Budget(60 * options.minutes)
    results, points = run(budget, options.toy)
    results |= {"left_out": budget.left_out, "seconds": time.monotonic() - began}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results, points))
    if results.get("tests", {}).keys() & {"failed", "error"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
