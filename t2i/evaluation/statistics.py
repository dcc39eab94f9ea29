"""Features of sets of pictures, and those of reference sets kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2i.errors import ConfigError, DataError
from t2i.evaluation.distances import Gaussian
from t2i.evaluation.features import Extractor
from t2i.evaluation.pictures import Item, Pictures, batches, stacked
from t2i.few import plural
from t2i.files import user_cache, written_whole

ENTRY = "t2i_statistics"


@dataclass(frozen=True)
class Statistics:
    """features: (N, D) float32; gaussian: their mean and covariance; about: what they are of: data, fingerprint,
    size_px, features, sha256, resize, count, and what was left out by cause"""

    features: Tensor
    gaussian: Gaussian
    about: dict[str, Any]

    @property
    def left_out(self) -> dict[str, int]:
        """Of the pictures, by cause; {} of files that were written before this was kept."""
        return self.about.get("left_out", {})


def collect(
    pictures: Pictures,
    extractors: Sequence[Extractor],
    batch_size: int,
    progress: Callable[[int], None],
    look: Callable[[list[Item]], None] = lambda items: None,
) -> list[Tensor]:
    """The features (N, D) of all pictures by each of the extractors, read or drawn once. Raises DataError for features
    that are not finite, of which there is no distance.

    look: sees each batch, too; progress: is told how many pictures each brought
    """
    parts: list[list[Tensor]] = [[] for _ in extractors]
    for items in batches(pictures, batch_size):
        look(items)
        for part, extractor in zip(parts, extractors, strict=True):
            part.append(extractor(stacked(items)))
        progress(len(items))
    found = [torch.cat(part) for part in parts]
    for extractor, features in zip(extractors, found, strict=True):
        if bad := int((~features.isfinite().all(1)).sum()):
            raise DataError(
                f"{extractor.title} gives numbers that are not finite for {bad:,} of "
                f"{plural(len(features), 'picture')} of {pictures.name}: its weights are no whole "
                "copy; allowed: --features with others."
            )
    return found


def reference_statistics(
    pictures: Pictures,
    extractors: Sequence[Extractor],
    batch_size: int,
    progress: Callable[[int], None],
    file: Path | None = None,
) -> list[Statistics]:
    """Of real pictures, by each of the extractors: read where they are kept, else computed and kept.

    file: where, with one extractor; None: in the user's cache, under a name that pictures and features decide
    Raises DataError where `file` holds those of other data or features.
    """
    if file is not None and len(extractors) != 1:
        raise ConfigError(f"--statistics {file} is one file; allowed: with one --features.")
    abouts = [_about(pictures, extractor) for extractor in extractors]
    places = [file or user_cache() / "statistics" / f"{_name(about)}.safetensors" for about in abouts]
    found = [read(place) if place.is_file() else None for place in places]
    for place, about, one in zip(places, abouts, found, strict=True):
        if one is not None:
            _check_same(place, one.about, about)
    todo = [i for i, one in enumerate(found) if one is None]
    if todo:
        made = collect(pictures, [extractors[i] for i in todo], batch_size, progress)
        for i, features in zip(todo, made, strict=True):
            if len(features) < 2:
                raise DataError(f"{pictures.name} holds one picture; allowed: 2 or more.")
            about = abouts[i] | {"count": len(features), "left_out": dict(pictures.bad)}
            found[i] = Statistics(features, Gaussian.of(features), about)
            write(found[i], places[i])  # type: ignore[arg-type]
    return [one for one in found if one is not None]


def write(statistics: Statistics, path: Path) -> None:
    """As safetensors, with what they are of in the header."""
    gaussian = statistics.gaussian
    tensors = {"features": statistics.features, "mean": gaussian.mean, "covariance": gaussian.covariance}
    with written_whole(path) as unfinished:
        save_file(tensors, unfinished, metadata={ENTRY: json.dumps(statistics.about)})


def read(path: Path) -> Statistics:
    """Raises DataError for a file that is none of `write`'s."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ENTRY, "null"))
            features, mean, covariance = (
                file.get_tensor(name) for name in ("features", "mean", "covariance")
            )
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as statistics of a reference: {error}.") from error
    if not isinstance(about, dict):
        raise DataError(f"{path} was not written by `t2i evaluate`: it does not say what it is of.")
    if not all(tensor.isfinite().all() for tensor in (features, mean, covariance)):
        raise DataError(f"{path} holds statistics that are not finite; remove it, so that it is made again.")
    return Statistics(features, Gaussian(mean, covariance, len(features)), about)


def _about(pictures: Pictures, extractor: Extractor) -> dict[str, Any]:
    return {
        "data": pictures.name,
        "fingerprint": pictures.fingerprint,
        "size_px": list(pictures.size_px),
        "asked": pictures.count,
        "features": extractor.title,
        "sha256": extractor.sha256,
        "resize": extractor.resize,
    }


def _name(about: dict[str, Any]) -> str:
    deciding = {key: value for key, value in about.items() if key != "data"}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:24]


def _check_same(path: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    for key, value in asked.items():
        if key != "data" and found.get(key) != value:
            raise DataError(
                f"{path} holds statistics with {key} {found.get(key)!r}, asked is {value!r}; allowed: another file."
            )
