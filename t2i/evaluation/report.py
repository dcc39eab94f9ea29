"""The report: what runs learned from, what they draw, how often that is what was asked, and how they compare."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.evaluation.background import white_deviation
from t2i.evaluation.comparison import NOT_THE_SAME, comparison, same_prompts, share, spoken
from t2i.evaluation.page import Page
from t2i.evaluation.prompts import GroupScore, group_of, judge_for, score, score_groups
from t2i.evaluation.reconstruction import psnr
from t2i.evaluation.runs import LEFT_OUT, Origin, Run, prompts_hash
from t2i.few import plural
from t2i.training.pictures import grid

NUM_SHOWN = 40
# Columns of metrics.csv that every stage has; the others are what the stage itself measures.
SHARED_COLUMNS = re.compile(
    "step|images|images_per_second|mfu|data_wait|peak_memory_gib|learning_rate|skipped_steps|epoch.*|gradient_norm.*|bad_.*"
    "|(validation_)?loss_time_.*|drawn_.*"  # parts of a loss
)


@dataclass(frozen=True)
class Families:
    """What a report needs of the families, which it does not know.

    draw: (run, N prompts) -> (N, 3, H, W) in [-1, 1] at the run's own resolution
    reconstruct: (run of a codec, pictures (N, 3, H, W) in [-1, 1]) -> the same through the codec
    num_parameters: (run) -> of the networks that it trained, without those of the runs that it builds on
    commands: (run that was asked for, one of its held-out prompts) -> what to type next
    """

    draw: Callable[[Path, list[str]], Tensor]
    reconstruct: Callable[[Path, Tensor], Tensor]
    num_parameters: Callable[[Path], int]
    commands: Callable[[Origin, str], list[str]]


def write_report(folder: Path, asked: Sequence[Origin], families: Families) -> Path:
    """Writes report.html, report.json and their PNGs into `folder`, on the runs that were `asked` for and on those that
    they continue and build on. What is said of one run at the top of report.json is said of the last."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    page = Page(folder, "t2i: from captioned shards to pictures")
    origins = list({one.folder: one for each in asked for one in each.ladder()}.values())
    codec_folders = list(dict.fromkeys(one.codec for one in origins if one.codec is not None))
    everything = Run.read_all([*codec_folders, *(one.folder for one in origins)])
    codecs, runs = everything[: len(codec_folders)], everything[len(codec_folders) :]
    known = {run.folder: run for run in everything}
    parameters = {run.folder: families.num_parameters(run.folder) for run in everything}

    page.heading("The data")
    show_data(page, [known[one.folder] for one in asked])
    of_codecs, of_runs = dict[str, Any](), dict[str, Any]()
    for codec in codecs:
        user = next(one.folder for one in reversed(origins) if one.codec == codec.folder)
        shown = show_codec(page, codec, known[user], families)
        of_codecs[codec.label] = facts(codec, parameters[codec.folder]) | shown
    for origin, run in zip(origins, runs, strict=True):
        shown = show_run(page, run, families)
        of_runs[run.label] = facts(run, parameters[run.folder]) | {
            "parameters_in_all": sum(parameters[path] for path in origin.draws_with()),
            "seconds_in_all": seconds_in_all(origin, known),
            **shown,
        }
        for place in origin.left_out:
            page.paragraph(f"It began with or builds on {place}, {LEFT_OUT}.")

    page.heading("Side by side")
    header, *rows = comparison(of_runs)
    page.table(rows, header=header)
    page.paragraph("Chance: how often real held-out pictures show what the prompts of other pictures say.")
    if not same_prompts(of_runs):
        page.paragraph(NOT_THE_SAME)
    page.heading("Training")
    for run in everything:
        page.plot(f"loss_{run.label}", f"{run.label}: {run.folder}", partial(plot_metrics, folder=run.folder))
    page.heading("Times")
    seconds = {run.label: run.seconds for run in everything if run.seconds is not None}
    seconds["report"] = round(time.perf_counter() - began, 1)
    page.table([(name, f"{each:.0f} s") for name, each in seconds.items()])
    page.heading("To go on")
    lines = [line for one in asked for line in families.commands(one, a_prompt(known[one.folder]))]
    page.commands(list(dict.fromkeys(lines)))
    last = asked[-1]
    codec_of_last = known[last.codec] if last.codec is not None else None
    figures = figures_of(known[last.folder], codec_of_last, of_codecs, of_runs)
    (folder / "report.json").write_text(json.dumps({"seconds": seconds, **figures}, indent=2) + "\n")
    return page.write("report.html")


def figures_of(
    last: Run, codec: Run | None, of_codecs: dict[str, Any], of_runs: dict[str, Any]
) -> dict[str, Any]:
    """report.json but for the times: first what is said of the last run that was asked for, then what has an entry for
    each."""
    figures: dict[str, Any] = {}
    if codec is not None:
        figures["psnr_db"] = of_codecs[codec.label]["psnr_db"]
    if of_codecs:
        figures["psnr_db_by_codec"] = {label: each["psnr_db"] for label, each in of_codecs.items()}
    for name, group in of_runs[last.label]["groups"].items():
        figures[f"{name}_exact"] = group["exact"]
        figures[f"{name}_by_attribute"] = group["by_attribute"]
    for label, run in of_runs.items():
        for name, group in run["groups"].items():
            figures.setdefault(f"{name}_exact_by_run", {})[label] = group["exact"]
        if run["white_background_deviation"] is not None:
            figures.setdefault("white_background_deviation", {})[label] = run["white_background_deviation"]
    return figures | {"codecs": of_codecs, "runs": of_runs}


def seconds_in_all(origin: Origin, known: dict[Path, Run]) -> float | None:
    """Of training the run and all that it continues and builds on; None where one of these times is not known."""
    times = [known[path].seconds for path in origin.folders()]
    if any(one.left_out for one in origin.ladder()) or None in times:
        return None
    return round(sum(each for each in times if each is not None), 1)


def facts(run: Run, num_parameters: int) -> dict[str, Any]:
    return {
        "stage": run.stage,
        "size_px": run.size_px,
        "folder": str(run.folder),
        "parameters": num_parameters,
        "seconds": run.seconds,
    }


def a_prompt(run: Run) -> str:
    return run.heldout(run.size_px, limit=1).caption[0]


def show_data(page: Page, runs: Sequence[Run]) -> None:
    """Training pictures, of each data set once."""
    seen = []
    for run in runs:
        if run.config["data"].get("shards") in seen:
            continue
        seen.append(run.config["data"].get("shards"))
        shown = run.train(run.size_px, limit=NUM_SHOWN)
        page.picture(
            "data" if len(seen) == 1 else f"data_{run.label}",
            grid(shown.image, 8),
            "Training pictures, with captions such as: " + "; ".join(shown.caption[:3]),
            2,
        )


def show_codec(page: Page, codec: Run, user: Run, families: Families) -> dict[str, Any]:
    """Held-out pictures of a run that builds on the codec, through it: their PSNR in dB, and what they still show."""
    page.heading(codec.title)
    heldout = user.heldout(codec.size_px)
    decoded = families.reconstruct(codec.folder, heldout.image)
    psnr = round(psnr_db(heldout.image, decoded), 2)
    page.paragraph(f"Pictures that no stage was trained on come back with {psnr} dB PSNR.")
    judge = judge_for(partial(user.train, codec.size_px), heldout)
    exact: dict[str, float] = {}
    if judge is not None:
        answers = judge(decoded, heldout.metadata)
        groups = [group_of(sample) for sample in heldout.metadata]
        for name in dict.fromkeys(groups):
            found = score([one for one, group in zip(answers, groups, strict=True) if group == name])
            exact[name] = found.exact
            page.paragraph(
                f"{spoken(name)}: {found.exact:.1%} of {found.count} still show exactly what their captions say."
            )
    pairs = zip(heldout.image[:16].split(8), decoded[:16].split(8), strict=True)
    page.picture(
        f"reconstructions_{codec.label}",
        grid(torch.cat([row for pair in pairs for row in pair]), 8),
        "Held-out pictures, each row above its reconstruction",
        2,
    )
    return {"psnr_db": psnr, "exact": exact}


def show_run(page: Page, run: Run, families: Families) -> dict[str, Any]:
    """What a run draws for held-out prompts, and how often that is right; its entry in report.json."""
    page.heading(run.title)
    unseen = run.heldout(run.size_px)
    judge = judge_for(partial(run.train, run.size_px), unseen)
    images = families.draw(run.folder, unseen.caption if judge else unseen.caption[:NUM_SHOWN])
    scores = {} if judge is None else score_groups(judge, images, unseen)
    say_scores(page, scores)
    deviation = white_deviation(images, unseen.image[: len(images)])
    if deviation is not None:
        page.paragraph(
            f"Where the real picture's background is white, these are {deviation:.1f} of 255 levels darker."
        )
    asked = "; ".join(unseen.caption[:NUM_SHOWN])
    page.picture(
        f"samples_{run.label}",
        grid(images[:NUM_SHOWN], 8),
        f"Drawn for prompts never seen in training, row by row: {asked}",
        enlarge=max(1, 128 // run.size_px),
    )
    groups = {name: each.to_json() for name, each in scores.items()}
    return {
        "prompts": prompts_hash(unseen.caption),
        "groups": groups,
        "white_background_deviation": None if deviation is None else round(deviation, 2),
    }


def psnr_db(image: Tensor, decoded: Tensor) -> float:
    """Mean over pictures; see `t2i.evaluation.reconstruction.psnr`."""
    return float(psnr(image, decoded).mean())


def plot_metrics(axes: Any, folder: Path) -> None:
    """All that the stage itself measured, such as its losses, over images seen."""
    path, rows = folder / "metrics.csv", []
    if path.is_file():  # absent where a run ended before its first log
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    names = dict.fromkeys(name for row in rows for name in row)
    for name in (each for each in names if each and not SHARED_COLUMNS.fullmatch(each)):
        points = [(int(row["images"]), float(row[name])) for row in rows if row.get(name)]
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    axes.set_xlabel("images seen")
    if axes.lines:
        axes.set_yscale("symlog", linthresh=0.01)  # a GAN's losses may be negative
        axes.legend()


def say_scores(page: Page, scores: dict[str, GroupScore]) -> None:
    """Writes the scores of one run as text and tables."""
    for name, each in scores.items():
        drawn, real, chance = each.drawn, each.real, each.chance
        page.paragraph(
            f"{spoken(name)}: of {plural(drawn.count, 'prompt')} never seen in training, "
            f"{drawn.exact:.1%} of the pictures show exactly what was asked "
            f"(the real pictures: {real.exact:.1%}; real pictures of other prompts: "
            f"{share(chance.exact if chance else None)})."
        )
        page.table(
            [
                (
                    key,
                    share(value),
                    share(chance.by_attribute[key] if chance else None),
                    share(real.by_attribute[key]),
                )
                for key, value in drawn.by_attribute.items()
            ],
            header=("attribute", "drawn", "chance", "real pictures"),
        )
