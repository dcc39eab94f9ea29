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


def medians(commands: dict[str, list[str]], rounds: int) -> dict[str, float]:
    """Seconds of each command, over interleaved runs."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(seconds(command))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints both medians and their ratio."""
    t2i = str(Path(sys.executable).with_name("t2i"))
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "t2i --help": [t2i, "--help"]}
    taken = medians(commands, ROUNDS)
    for name, median in taken.items():
        print(f"{name:16} {median * 1000:6.1f} ms")
    print(f"ratio            {taken['t2i --help'] / taken['python -c pass']:6.2f}")


if __name__ == "__main__":
    main()
