"""`t2i evaluate compare RUN ...`: runs of any families by one protocol, in one table."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from t2i.errors import UserError
from t2i.schema import check

from ..arguments import Parser
from .options import add_measures, check_file, check_numbers, extractors_of, write_json
from .runs import (
    add_prompts,
    check_measured,
    check_places,
    check_prompts,
    config_of,
    each_once,
    measure_generator,
)


def run(arguments: list[str]) -> None:
    """Measures each run with the prompts and the reference of the first; writes the tables."""
    options = parser().parse_args(arguments)
    check_numbers(options)
    check_prompts(options)
    check(options.out != "", "--out", "", "a folder")
    check_places("RUN", options.runs, "a run or a checkpoint of one")
    # Heavy imports only now: a wrong flag is reported at once.
    from t2i.evaluation.table import as_csv, comparison_rows, notes, write_tables
    from t2i.generation.names import check_folder

    from ..console import console, print_table
    from ..generators import check_draws

    check_folder(Path(options.out))
    check_file("--statistics", options.statistics)
    extractors = extractors_of(options)
    places = each_once(options.runs)
    configs = [config_of(place) for place in places]
    for place, config in zip(places, configs, strict=True):
        check_draws(place, config)  # of all, before the first draws for hours
    measured, failed = [], []
    for place in places:
        try:
            measured.append(measure_generator(place, options, extractors, (), configs[0]))
        except UserError as error:
            failed.append((place, str(error)))
    if not measured:
        check_measured(failed, len(failed), "runs")
    runs = [(each.about, each.figures) for each in measured]
    rows, said = comparison_rows(runs, options.published), notes(runs)
    folder = Path(options.out)
    for path in write_tables(rows, said, as_csv(runs, options.published), folder):
        console.print(str(path))
    print_table(rows)
    for line in said:
        console.print(line)
    values = [each.about | {"figures": [dataclasses.asdict(f) for f in each.figures]} for each in measured]
    write_json(folder / "compare.json", {"runs": values})
    check_measured(failed, len(places), "runs")


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="t2i evaluate compare",
        description="Runs of any families in one table, all with the first one's prompts, seeds and reference.",
    )
    made.add_argument("runs", nargs="+", metavar="RUN", help="runs, or checkpoints of runs")
    add_prompts(made)
    made.add_argument(
        "--out", default="compare", metavar="DIR", help="folder of compare.md, .csv, .png and .json"
    )
    made.add_argument("--published", action="store_true", help="with rows of published figures, marked so")
    add_measures(made)
    return made
