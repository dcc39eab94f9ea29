"""The scaling curve of a sweep as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from t2i.planning.speed import Speed

BLUE, GREY = "#2a6fbb", "#9aa0a6"


def draw_scaling(speeds: Sequence[Speed], title: str, path: Path) -> None:
    """Images per second against the ideal, and days, both over the number of GPUs."""
    from matplotlib.figure import Figure  # draws by itself, with no window system
    from matplotlib.ticker import LogLocator

    gpus = [speed.num_gpus for speed in speeds]
    figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=100)
    rate, days = figure.subplots(1, 2)
    figure.suptitle(title)
    ideal = [speed.ideal_images_per_second for speed in speeds]
    rate.plot(gpus, ideal, "--", color=GREY, label="no communication")
    rate.plot(gpus, [speed.images_per_second for speed in speeds], "o-", color=BLUE, label="planned")
    rate.set_ylabel("images per second")
    rate.legend(frameon=False)
    days.plot(gpus, [speed.days for speed in speeds], "o-", color=BLUE)
    days.set_ylabel("days")
    for speed in speeds:
        share = speed.images_per_second / speed.ideal_images_per_second
        below = {"xytext": (6, -12), "textcoords": "offset points", "fontsize": 8}
        rate.annotate(f"{share:.0%}", (speed.num_gpus, speed.images_per_second), **below)
        above = below | {"xytext": (6, 5)}
        days.annotate(f"{speed.days:.3g}", (speed.num_gpus, speed.days), **above)
    for axes in (rate, days):
        axes.set_xlabel("GPUs")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(gpus, [str(count) for count in gpus])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        axes.margins(0.12)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
