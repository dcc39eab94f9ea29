"""What is said of a set of pictures beside a reference: each figure with its counts and an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from t2i.errors import ConfigError
from t2i.evaluation.distances import (
    KID_SUBSETS,
    MOST_NEIGHBOURS,
    NEAREST,
    Gaussian,
    Manifolds,
    cmmd,
    frechet,
    halves,
    kid,
    manifolds,
)
from t2i.evaluation.features import Extractor
from t2i.evaluation.statistics import Statistics
from t2i.few import plural

HALF_KID_SUBSETS = 20
NORMAL_95 = 1.959964
SHARES = ("precision", "recall", "coverage")  # from 0 to 1


@dataclass(frozen=True)
class Figure:
    """name: such as "FID"; interval_95: in which it lies for 95% of such samples of pictures, None where that was not
    asked; count: pictures measured; features: by which network, and how pictures came to its size; reference: real
    ones"""

    name: str
    value: float
    interval_95: tuple[float, float] | None
    count: int
    features: str = ""
    reference: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_enough(extractor: Extractor, count: int, of: str, force: bool) -> None:
    """Raises ConfigError for one picture, which has no covariance, and where a covariance would be of fewer pictures
    than features: the distance then says more of their number than of them."""
    if count < 2:
        raise ConfigError(f"{of} has {plural(count, 'picture')}; allowed: 2 or more.")
    if count < extractor.width and not force:
        raise ConfigError(
            f"{extractor.distance} compares {extractor.width:,} features, and {of} has {plural(count, 'picture')}; "
            f"allowed: {extractor.width:,} or more, or --force, which gives the figure nevertheless."
        )


def figures(extractor: Extractor, features: Tensor, reference: Statistics, rounds: int) -> list[Figure]:
    """All distances that the features allow.

    features: (N, D) of the pictures, 2 or more; rounds: from how many halves of them the deviations are, 0: none;
        fewer than 4 pictures have no halves, and the figures no intervals
    """
    of_all = estimates(extractor, features, reference, KID_SUBSETS)
    of_halves = [
        estimates(extractor, features[half], reference, HALF_KID_SUBSETS)
        for half in halves(len(features), rounds if len(features) >= 4 else 0)  # each of 2 or more
    ]
    described = f"{extractor.title}, resize {extractor.resize}"
    made = []
    for name, value in of_all.items():
        spread = [each[name] for each in of_halves if name in each]
        interval = normal_interval(value, statistics.stdev(spread)) if len(spread) > 1 else None
        if interval is not None and name in SHARES:
            interval = max(0.0, interval[0]), min(1.0, interval[1])
        counts = [len(features), len(reference.features)]
        if name in Manifolds.__annotations__:
            counts = [min(each, MOST_NEIGHBOURS) for each in counts]
        made.append(Figure(name, value, interval, counts[0], described, counts[1]))
    return made


def estimates(
    extractor: Extractor, features: Tensor, reference: Statistics, kid_subsets: int
) -> dict[str, float]:
    """By name; those of neighbours only where there are enough."""
    real = reference.features
    found = {
        extractor.distance: frechet(reference.gaussian, Gaussian.of(features)),
        "KID x 1000": 1000 * kid(features, real, kid_subsets)[0],
    }
    if extractor.clip is not None:
        found["CMMD"] = cmmd(features, real)
    if min(len(features), len(real)) > NEAREST:
        found |= asdict(manifolds(features, real))
    return found


def mean_figure(name: str, values: Tensor, features: str = "") -> Figure:
    """A mean over pictures, with the interval of a normal mean."""
    values = values.double()
    mean, count = float(values.mean()), len(values)
    interval = normal_interval(mean, float(values.std()) / count**0.5) if count > 1 else None
    return Figure(name, mean, interval, count, features)


def score_figures(name: str, values: Tensor, categories: Sequence[str], features: str) -> list[Figure]:
    """The mean over all pictures, and that of each category.

    values: (N,); categories: of each picture, "" where it has none
    """
    made = [mean_figure(name, values, features)]
    for category in dict.fromkeys(filter(None, categories)):
        places = [i for i, each in enumerate(categories) if each == category]
        made.append(mean_figure(f"{name}, category {category}", values[places], features))
    return made


def share_figure(name: str, right: Sequence[bool], features: str = "") -> Figure:
    """A share of pictures, with Wilson's interval (1927), which is none of width 0 where all or none are right."""
    count, share = len(right), sum(right) / len(right)
    square = NORMAL_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return Figure(name, share, (max(0.0, middle - half), min(1.0, middle + half)), count, features)


def normal_interval(value: float, deviation: float) -> tuple[float, float]:
    """Of 95%."""
    return value - NORMAL_95 * deviation, value + NORMAL_95 * deviation


def rows(made: Sequence[Figure]) -> list[list[str]]:
    """A table of text, the header first."""
    table = [["figure", "value", "95% interval", "pictures", "reference"]]
    for each in made:
        low_high = "-"
        if each.interval_95 is not None:
            low_high = f"{each.interval_95[0]:.4g} to {each.interval_95[1]:.4g}"
        reference = "-" if each.reference is None else f"{each.reference:,}"
        table.append([each.name, f"{each.value:.5g}", low_high, f"{each.count:,}", reference])
    return table
