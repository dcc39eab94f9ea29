"""`t2i evaluate sweep RUN ... key=a,b,c ...`: a distance and the CLIP score over options of sampling."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.errors import ConfigError, UserError
from t2i.few import plural
from t2i.schema import check

from ..arguments import Parser, add_launch, launch_of
from ..submit import submit_shared
from .options import add_measures, check_file, check_numbers, extractors_of
from .runs import (
    HELDOUT,
    add_prompts,
    check_measured,
    check_places,
    check_prompts,
    config_of,
    each_once,
    measure_generator,
    prompts_of,
    reference_of,
)

if TYPE_CHECKING:
    from t2i.evaluation.features import Extractor

PATIENCE_S = 600.0  # until it is this process's turn to draw the curves


def run(arguments: list[str]) -> None:
    """Measures this process's part of the points that are not there yet; draws the curves of all that are. With
    launch=slurm it is a job of SLURM that does so."""
    launch, arguments = launch_of(parser(), arguments)
    options = parser().parse_intermixed_args(arguments)
    check_numbers(options)
    check_prompts(options)
    check(options.out != "", "--out", "", "a folder")
    places = [word for word in options.words if Path(word).exists() or "=" not in word]
    check(bool(places), "RUN", None, "at least one run or checkpoint")
    check_places("RUN", places, "a run or a checkpoint of one")
    choices = [parsed(word) for word in options.words if word not in places]
    keys = [choice[0][0] for choice in choices]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    check(twice is None, "sweep", f"{twice} twice", f"each key once, as {twice}=value,value")
    if launch is not None:
        submit_shared(["evaluate", "sweep"], arguments, launch)
        return
    # Heavy imports only now: a wrong flag is reported at once.
    from t2i import families
    from t2i.config import parse_run
    from t2i.evaluation.curves import Point, write_curves
    from t2i.generation.names import check_folder
    from t2i.launch.lock import locked
    from t2i.launch.processes import own_device
    from t2i.launch.ranks import rank_of

    from ..console import console, part_of
    from ..generators import check_draws, with_overrides

    check_folder(Path(options.out))
    check_file("--statistics", options.statistics)
    rank, console.quiet = rank_of(os.environ), False
    own_device(rank)
    extractors, folder = extractors_of(options), Path(options.out)
    places = each_once(places)
    configs = [config_of(place) for place in places]
    for place, config in zip(places, configs, strict=True):  # of all, before the first draws for hours
        check_draws(place, config)
        for each in itertools.product(*choices):
            changed = with_overrides(config, overrides_of(each))
            try:
                parse_run(changed, families.get(config["family"]).load_config())
            except ConfigError as error:
                raise ConfigError(f"{place} cannot be drawn with: {error}") from error
    protocol = configs[0]
    content = content_of(options, protocol)
    wanted = [
        (
            place,
            dict(chosen),
            folder / "points" / name_of(place, chosen, options, extractors, content),
        )
        for place in places
        for chosen in itertools.product(*choices)
    ]
    mine = wanted[rank.rank :: rank.world]
    failed = []
    for number, (place, chosen, file) in enumerate(mine, 1):
        said = " ".join([place, *(f"{key}={value}" for key, value in chosen.items())])
        if file.is_file():
            console.print(f"{number} of {len(mine)}{part_of(rank)}: {said} is there")
            continue
        try:
            measured = measure_generator(place, options, extractors, overrides_of(chosen.items()), protocol)
        except UserError as error:
            failed.append((said, str(error)))
            continue
        point = Point(place, chosen, measured.about, measured.figures)
        point.write(file)
        console.print(
            f"{number} of {len(mine)}{part_of(rank)}: {said}: {point.distance.name} {point.distance.value:.4g}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, PATIENCE_S):  # whoever is last finds all of them
        found = [Point.read(file) for _, _, file in wanted if file.is_file()]
        for path in write_curves(found, folder) if found else ():
            console.print(str(path))
    if missing := len(wanted) - len(found) - len(failed):
        console.print(f"Still to come from other processes: {missing:,} of {plural(len(wanted), 'point')}.")
    check_measured(failed, len(mine), "points")


def overrides_of(chosen: Iterable[tuple[str, str]]) -> list[str]:
    """As `t2i sample` takes them."""
    return [f"sampling.{key}={value}" for key, value in chosen]


def parsed(word: str) -> list[tuple[str, str]]:
    """key=a,b as [(key, a), (key, b)], of equal numbers the first. Raises ConfigError for what has no values."""
    key, _, values = word.partition("=")
    key = key.removeprefix("sampling.")
    given = [value for value in values.split(",") if value]
    check(bool(key and given), "sweep", word, "key=value,value,..., such as guidance_scale=1.5,3,5")
    different = dict[float | str, str]()
    for value in given:
        different.setdefault(_number(value), value)
    return [(key, value) for value in different.values()]


def _number(value: str) -> float | str:
    """What is typed as 1, 1.0 or 1e0 is one number; other text is itself."""
    try:
        return float(value)
    except ValueError:
        return value


def name_of(
    place: str,
    chosen: Sequence[tuple[str, str]],
    options: argparse.Namespace,
    extractors: Sequence[Extractor],
    content: Sequence[str],
) -> str:
    """Tells what decides a point's figures: weights, options, prompts, reference, features.

    content: as `content_of` gives it
    """
    from t2i.training import run_folder

    weights = run_folder.weights_file(place)
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(weights)]
    asked = {
        key: getattr(options, key)
        for key in ("prompts", "count", "reference", "reference_count", "seed", "rounds")
    }
    networks = [(each.title, each.resize, each.sha256) for each in extractors]
    decides = json.dumps([str(weights.resolve()), state, list(chosen), asked, networks, content])
    return f"{hashlib.sha256(decides.encode()).hexdigest()[:20]}.json"


def content_of(options: argparse.Namespace, protocol: dict[str, Any]) -> list[str]:
    """Digests of the prompts and of the reference: of what is in them, as a file may be edited under its name.

    protocol: the configuration whose held-out pictures are meant
    """
    from t2i.evaluation.runs import prompts_hash

    if options.prompts == HELDOUT:
        prompts = reference_of(
            None, protocol, None
        ).fingerprint  # no need to read all pictures for their captions
    else:
        prompts = prompts_hash([prompt.text for prompt in prompts_of(options, protocol)])
    reference = reference_of(options.reference, protocol, options.reference_count)
    return [json.dumps(protocol["data"]), prompts, reference.fingerprint]


def files_of(weights: Path) -> list[Path]:
    """Of a checkpoint, which may be a folder."""
    return sorted(path for path in weights.iterdir() if path.is_file()) if weights.is_dir() else [weights]


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="t2i evaluate sweep",
        description="All combinations of runs or checkpoints and of options of sampling, on one plot: sweep.csv, "
        "sweep.png, and encoders.png where the runs' text encoders differ. What is there is not measured again; under "
        "torchrun or srun each process takes its part, and with cluster=NAME launch=slurm it is a job of SLURM.",
    )
    made.add_argument(
        "words",
        nargs="+",
        metavar="RUN|key=a,b",
        help="runs and checkpoints, and lists such as guidance_scale=1.5,2,3 sampler=ddim,dpmpp_2m steps=10,50",
    )
    add_prompts(made)
    made.add_argument("--out", default="sweep", metavar="DIR", help="folder of the points and of the curves")
    add_measures(made)
    add_launch(made)
    return made
