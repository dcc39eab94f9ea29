"""What is said of a set of pictures beside a reference: each figure with its counts and an interval."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from t2i.errors import ConfigError
from t2i.evaluation.distances import (
    KID_SUBSETS,
    NEAREST,
    Gaussian,
    cmmd,
    frechet,
    halves,
    kid,
    manifolds,
)
from t2i.evaluation.features import Extractor
from t2i.evaluation.statistics import Statistics

HALF_KID_SUBSETS = 20
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Figure:
    """name: such as "FID"; features: by which network, and how pictures came to its size; deviation: the standard
    deviation over samples of pictures, None where it was not asked; count: pictures measured; reference: real ones"""

    name: str
    value: float
    deviation: float | None
    count: int
    features: str = ""
    reference: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """In which 95% of such samples have the value, if their values are normal around it."""
        if self.deviation is None:
            return None
        return self.value - NORMAL_95 * self.deviation, self.value + NORMAL_95 * self.deviation

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"interval_95": self.interval}


def check_enough(extractor: Extractor, count: int, of: str, force: bool) -> None:
    """Raises ConfigError where a covariance would be of fewer pictures than features: the distance then says more of
    their number than of them."""
    if count < extractor.width and not force:
        raise ConfigError(
            f"{extractor.distance} compares {extractor.width:,} features, and {of} has {count:,} pictures; allowed: "
            f"{extractor.width:,} or more, or --force, which gives the figure nevertheless."
        )


def figures(extractor: Extractor, features: Tensor, reference: Statistics, rounds: int) -> list[Figure]:
    """All distances that the features allow.

    features: (N, D) of the pictures; rounds: from how many halves of them the deviations are, 0: none
    """
    of_all = estimates(extractor, features, reference, KID_SUBSETS)
    of_halves = [
        estimates(extractor, features[half], reference, HALF_KID_SUBSETS)
        for half in halves(len(features), rounds)
    ]
    described = f"{extractor.title}, resize {extractor.resize}"
    count, of_reference = len(features), len(reference.features)
    made = []
    for name, value in of_all.items():
        spread = [each[name] for each in of_halves if name in each]
        deviation = statistics.stdev(spread) if len(spread) > 1 else None
        made.append(Figure(name, value, deviation, count, described, of_reference))
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
    """A mean over pictures; the deviation is that of the mean."""
    values = values.double()
    spread = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Figure(name, float(values.mean()), spread, len(values), features)


def rows(made: Sequence[Figure]) -> list[list[str]]:
    """A table of text, the header first."""
    table = [["figure", "value", "95% interval", "pictures", "reference"]]
    for each in made:
        low_high = "-" if each.interval is None else f"{each.interval[0]:.4g} to {each.interval[1]:.4g}"
        reference = "-" if each.reference is None else f"{each.reference:,}"
        table.append([each.name, f"{each.value:.5g}", low_high, f"{each.count:,}", reference])
    return table
