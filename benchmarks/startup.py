"""How long `t2i --help` takes, as a ratio to `python -c pass`: interleaved runs, medians."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15


def seconds(command: list[str]) -> float:
    """Wall time of one run."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def seconds_of_python(code: str) -> float:
    """Of a fresh interpreter that runs `code`."""
    return seconds([sys.executable, "-c", code])


def main() -> None:
    """Prints both medians and their ratio."""
    t2i = str(Path(sys.executable).with_name("t2i"))
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "t2i --help": [t2i, "--help"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:16} {median * 1000:6.1f} ms")
    print(f"ratio            {medians['t2i --help'] / medians['python -c pass']:6.2f}")


if __name__ == "__main__":
    main()
