"""`t2i evaluate FOLDER|RUN`: how near pictures are to real ones, and to their captions."""

from __future__ import annotations

import argparse
from pathlib import Path

from t2i.schema import check

from .options import (
    add_measures,
    bar,
    check_numbers,
    extractors_of,
    plain_data,
    print_table,
    write_json,
)


def run(arguments: list[str]) -> None:
    """Reads or draws, computes features, prints the figures."""
    options = parser().parse_args(arguments)
    check_numbers(options)
    target = Path(options.target)
    check(target.is_dir(), "FOLDER|RUN", options.target, "a folder of pictures, or a run")
    check(options.reference is not None, "--reference", None, "a folder of pictures, or shards")
    # Heavy imports only now: a wrong flag is reported at once.
    from t2i.evaluation.measure import check_enough, figures, rows
    from t2i.evaluation.pictures import generated_folder, reference
    from t2i.evaluation.statistics import collect, reference_statistics

    from ..console import console

    pictures = generated_folder(target)
    real = reference(options.reference, pictures.size_px, plain_data(), options.reference_count)
    extractors = extractors_of(options)
    for extractor in extractors:
        check_enough(extractor, pictures.count, pictures.name, options.force)
        check_enough(extractor, real.count, real.name, options.force)
    with bar("reference", len(extractors) * real.count) as progress:
        known = reference_statistics(real, extractors, options.batch_size, progress, options.statistics)
    with bar("pictures", pictures.count) as progress:
        found = collect(pictures, extractors, options.batch_size, progress)
    for cause, count in sorted(real.bad.items()):
        console.print(f"Left out of {real.name}, {cause}: {count}")
    made = [
        figure
        for extractor, features, statistics in zip(extractors, found, known, strict=True)
        for figure in figures(extractor, features, statistics, options.rounds)
    ]
    for features in dict.fromkeys(figure.features for figure in made):
        console.print(features)
        print_table(rows([figure for figure in made if figure.features == features]))
    about = {"pictures": pictures.name, "reference": [each.about for each in known]}
    write_json(options.out, about | {"figures": [each.to_json() for each in made]})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="t2i evaluate",
        description="FID, KID, CMMD, precision, recall, density and coverage of pictures, and their CLIP score.",
        epilog="t2i evaluate compare RUN ...: a table of runs; t2i evaluate sweep RUN ...: a curve over their options.",
    )
    made.add_argument("target", metavar="FOLDER|RUN", help="pictures, or a run")
    made.add_argument(
        "--reference", metavar="FOLDER|SHARDS", help="real pictures; are cut to the size of the others"
    )
    made.add_argument("--reference-count", type=int, help="take the first so many of them; default: all")
    made.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="keep those of the reference here, and take them from here",
    )
    made.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    add_measures(made)
    return made
