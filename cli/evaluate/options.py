"""What the jobs of `t2i evaluate` have in common: flags, networks, runs that draw, bars."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.schema import check

if TYPE_CHECKING:
    import torch

    from t2i.data_config import DataConfig
    from t2i.evaluation.features import Extractor
    from t2i.evaluation.pictures import Pictures
    from t2i.evaluation.statistics import Statistics


def add_measures(made: argparse.ArgumentParser) -> None:
    """The flags of all jobs."""
    made.add_argument(
        "--features",
        action="append",
        metavar="NAME[=PLACE]",
        help="inception=FILE, dinov2=DIR, clip=DIR (with it the CLIP score), efficientnet (its ImageNet weights come "
        "in a package); may be given several times; default: efficientnet",
    )
    made.add_argument(
        "--resize",
        default="clean",
        help="for inception: clean (clean-fid), legacy_pytorch or legacy_tensorflow",
    )
    made.add_argument("--force", action="store_true", help="a distance of fewer pictures than features, too")
    made.add_argument("--rounds", type=int, default=20, help="halves that the intervals are from; 0: none")
    made.add_argument("--batch-size", type=int, default=64, help="pictures at a time")
    made.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")


def check_numbers(options: argparse.Namespace) -> None:
    """Raises ConfigError that names the first flag whose value is not to be had. Imports no torch."""
    check(options.batch_size >= 1, "--batch-size", options.batch_size, "1 or more")
    check(options.rounds == 0 or options.rounds >= 2, "--rounds", options.rounds, "2 or more, or 0 for none")
    resizes = ("clean", "legacy_pytorch", "legacy_tensorflow")
    check(options.resize in resizes, "--resize", options.resize, ", ".join(resizes))


def device_of(options: argparse.Namespace) -> torch.device:
    """Raises ConfigError for one that is not here."""
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    check(options.device in (None, *devices), "--device", options.device, " or ".join(devices))
    return torch.device(options.device or devices[-1])


def extractors_of(options: argparse.Namespace) -> list[Extractor]:
    """The networks that --features names, each once."""
    from t2i.evaluation.features import load

    specs = dict.fromkeys(options.features or ["efficientnet"])
    has_effect = any(spec.startswith("inception") for spec in specs)
    check(options.resize == "clean" or has_effect, "--resize", options.resize, "only with inception")
    device = device_of(options)
    return [load(spec, options.resize, device) for spec in specs]


def check_file(flag: str, path: Path | None) -> None:
    """Raises UserError where no file can be written to `path`: better before the pictures are measured than after."""
    from t2i.generation.names import check_folder

    if path is not None:
        check(not path.is_dir(), flag, str(path), "a file, no folder")
        check_folder(path.parent)


def plain_data() -> DataConfig:
    """How shards are read that no run names."""
    from t2i.data_config import DataConfig

    return DataConfig(
        source=None,
        shards="-",
        caption_keys=["txt", "json:caption"],
        filter_by_size=False,
        num_workers=0,
        cache_mib=0,
    )


@contextmanager
def bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar; what is given is called with the number of pictures that are done since."""
    from ..console import progress_bar

    with progress_bar() as shown:
        task = shown.add_task(name, total=total)
        yield lambda done: shown.advance(task, done)


def statistics_of(
    real: Pictures, extractors: Sequence[Extractor], options: argparse.Namespace
) -> list[Statistics]:
    """Of real pictures, by each of the extractors. Raises ConfigError where they are too few, also where that is so
    without those that cannot be read."""
    from t2i.evaluation.measure import check_enough
    from t2i.evaluation.statistics import reference_statistics

    for extractor in extractors:
        check_enough(extractor, real.count, real.name, options.force)
    with bar("reference", len(extractors) * real.count) as progress:
        known = reference_statistics(real, extractors, options.batch_size, progress, options.statistics)
    for extractor, one in zip(extractors, known, strict=True):
        check_enough(extractor, len(one.features), f"{real.name}, as far as it can be read,", options.force)
    return known


def write_json(path: Path | None, values: Any) -> None:
    """Where a file was asked for."""
    import json

    from t2i.files import written_whole

    from ..console import console

    if path is not None:
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps(values, indent=2) + "\n")
        console.print(f"The figures are in {path}")
