"""`t2i evaluate FOLDER|RUN`: how near pictures are to real ones, and to their captions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from t2i.errors import ConfigError
from t2i.schema import check

from ..arguments import Parser
from .options import (
    add_measures,
    bar,
    check_file,
    check_numbers,
    extractors_of,
    plain_data,
    statistics_of,
    write_json,
)
from .runs import HELDOUT, Measured, add_prompts, check_places, check_prompts, measure_generator

if TYPE_CHECKING:
    from t2i.evaluation.features import Extractor


def run(arguments: list[str]) -> None:
    """Reads or draws, computes features, prints the figures."""
    options = parser().parse_args(arguments)
    check_numbers(options)
    check_prompts(options)
    target = Path(options.target)
    check_places("FOLDER|RUN", [options.target], "a folder of pictures, a run or a checkpoint of one")
    is_run = not target.is_dir() or any(
        (target / name).exists() for name in ("config.yaml", "weights.safetensors")
    )
    if options.reference is None and not is_run:
        raise ConfigError("--reference is not given; allowed: a folder of pictures, or shards.")
    check_draws_nothing(is_run, options, "only with a run")
    check(is_run or options.lpips is None, "--lpips", options.lpips, "only with a codec")
    # Heavy imports only now: a wrong flag is reported at once.
    from t2i.evaluation.measure import rows

    from ..console import console, print_table

    check_file("--out", options.out)
    check_file("--statistics", options.statistics)
    extractors = extractors_of(options)
    measured = (measure_run if is_run else measure_folder)(options.target, options, extractors)
    for cause, count in sorted(measured.about.get("skipped", {}).items()):
        console.print(f"Left out of the pictures, {cause}: {count}")
    for cause, count in sorted(measured.about["left_out"].items()):
        console.print(f"Left out of the reference, {cause}: {count}")
    most, there = options.reference_count, measured.about["reference"][0]["count"]
    if most is not None and there < most:
        console.print(f"--reference-count is {most:,}; the reference has {there:,}: all are taken.")
    for features in dict.fromkeys(figure.features for figure in measured.figures):
        console.print(f"{options.target}, {features}")
        print_table(rows([figure for figure in measured.figures if figure.features == features]))
    write_json(options.out, measured.about | {"figures": [each.to_json() for each in measured.figures]})


def check_draws_nothing(draws: bool, options: argparse.Namespace, allowed: str) -> None:
    """Raises ConfigError for a flag that says what is drawn, where nothing is."""
    for name, default in {"prompts": HELDOUT, "count": None, "seed": 0}.items():
        value = getattr(options, name)
        check(draws or value == default, f"--{name}", value, allowed)


def measure_run(place: str, options: argparse.Namespace, extractors: Sequence[Extractor]) -> Measured:
    """A run that draws for prompts, or a codec."""
    from t2i import families
    from t2i.training import checkpoint, run_folder

    from .codecs import measure_codec

    family = checkpoint.load(run_folder.weights_file(place)).config.get("family")
    is_codec = families.get(family).generator is None and families.get(family).codec is not None
    check(is_codec or options.lpips is None, "--lpips", options.lpips, "only with a codec")
    check(not is_codec or options.count is None, "--count", options.count, "--reference-count with a codec")
    check_draws_nothing(not is_codec, options, "only with a run that draws")
    return (measure_codec if is_codec else measure_generator)(place, options, extractors)


def measure_folder(place: str, options: argparse.Namespace, extractors: Sequence[Extractor]) -> Measured:
    """Pictures in files, with what `t2i sample` wrote into them or a .txt beside as their captions."""
    from t2i.evaluation.features import clip_scores
    from t2i.evaluation.measure import check_enough, figures, mean_figure
    from t2i.evaluation.pictures import generated_folder, reference
    from t2i.evaluation.statistics import collect

    from .options import device_of

    pictures = generated_folder(Path(place))
    real = reference(options.reference, pictures.size_px, plain_data(), options.reference_count)
    for extractor in extractors:
        check_enough(extractor, pictures.count, pictures.name, options.force)
    known = statistics_of(real, extractors, options)
    captions: list[str] = []
    with bar("pictures", pictures.count) as progress:
        found = collect(
            pictures,
            extractors,
            options.batch_size,
            progress,
            lambda items: captions.extend(item.caption for item in items),
        )
    made = []
    for extractor, features, statistics in zip(extractors, found, known, strict=True):
        made += figures(extractor, features, statistics, options.rounds)
        told = [i for i, caption in enumerate(captions) if caption]
        if extractor.clip is not None and told:
            texts = [captions[i] for i in told]
            scores = clip_scores(extractor.clip, features[told], texts, device_of(options))
            made.append(mean_figure("CLIP score", scores, extractor.title))
    about = {
        "pictures": place,
        "skipped": dict(pictures.bad),
        "reference": [each.about for each in known],
        "left_out": known[0].left_out,
    }
    return Measured(made, about)


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="t2i evaluate",
        description="FID, KID, CMMD, precision, recall, density and coverage of pictures, their CLIP score, and of a "
        "run how often they show what was asked; of a codec rFID, PSNR, SSIM, LPIPS and the use of its codes.",
        epilog="t2i evaluate compare RUN ...: a table of runs; t2i evaluate sweep RUN ...: a curve over their options.",
    )
    made.add_argument("target", metavar="FOLDER|RUN", help="pictures, or a run or a checkpoint of one")
    add_prompts(made)
    made.add_argument(
        "--lpips", metavar="FILE", help="of a codec: torchvision's vgg16-397923af.pth, for LPIPS"
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    add_measures(made)
    return made
