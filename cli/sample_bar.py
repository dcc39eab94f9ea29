"""What `t2i sample` says while it draws and at the end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from t2i.config import TextConfig
from t2i.errors import UserError, shortened
from t2i.few import first_few, plural
from t2i.files import written_whole
from t2i.generation import grid
from t2i.generation.manifest import NAME
from t2i.generation.prompts import Prompts
from t2i.generation.recipes import Recipe, differences, read
from t2i.generation.strip import write_strip
from t2i.generation.text_to_image import NOT_FINITE, Drawing, Listener, Report, not_finite, write_grid
from t2i.interfaces import Generator
from t2i.launch.ranks import Rank

from .console import console, part_of, progress_bar

SAID_PATHS = 64  # pictures whose files are named; of more only the folder is


class Bar(Listener):
    """Pictures, and steps of those that are drawn at a time."""

    def __init__(self, rank: Rank) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = progress_bar(*columns)
        self._pictures = self._bar.add_task(f"pictures{part_of(rank)}", total=None)
        self._steps = self._bar.add_task("steps", total=None)
        self._named = 0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def share(self, pictures: int) -> None:
        self._bar.update(self._pictures, total=pictures)

    def steps(self, done: int, steps: int) -> None:
        self._bar.update(self._steps, completed=done, total=steps)

    def picture(self, path: Path | None) -> None:
        self._bar.advance(self._pictures)
        self._named += path is not None
        if path is not None and self._named <= SAID_PATHS:
            console.print(str(path))


def say_what_is_large(drawings: Sequence[Drawing], generator: Generator) -> None:
    """Sizes above the one of training: a convolutional network goes on where it has not been."""
    sizes = dict.fromkeys((each.request.height_px, each.request.width_px) for each in drawings)
    side = generator.default_size_px
    large = [f"{height} x {width}" for height, width in sizes if height * width > side * side]
    for size in first_few(large):
        console.print(
            f"{size} px is larger than the {side} x {side} px of training: what is drawn may repeat itself."
        )


def say_what_is_cut(text: TextConfig | None, prompts: Prompts, options: argparse.Namespace) -> None:
    """Prompts that are longer than the text encoder takes, each once, the first few by name."""
    from t2i.text.tokens import token_counter

    if text is None:
        return
    counter = token_counter(text)
    given: dict[str, str] = {}
    for line in prompts.lines:
        where = f"{options.prompts_file}, line {line.number}," if options.prompts_file else "--prompt"
        given.setdefault(line.prompt, where)
        if line.negative_prompt:
            given.setdefault(line.negative_prompt, "--negative-prompt")
    said = [
        f"{where} has {counter.count(words)} tokens, of which the text encoder takes {counter.max_tokens}: "
        f"{shortened(repr(cut))} is left out."
        for words, where in given.items()
        if (cut := counter.cut(words))
    ]
    for sentence in first_few(said):
        console.print(sentence)


def say_what_differs(options: argparse.Namespace, recipe: Recipe) -> None:
    """Whether what is there can make the picture of --recipe."""
    if options.recipe is None:
        return
    for difference in differences(read(Path(options.recipe))[0], recipe):
        console.print(f"{options.recipe} was drawn with {difference}.")


def conclude(
    report: Report, prompts: Prompts, options: argparse.Namespace, rank: Rank, sampling: Any
) -> None:
    """The grid, and what became of all pictures; of several processes the last to end says that. Raises UserError
    where some are not to be had."""
    folder = Path(options.out)
    drawn = plural(report.drawn, "picture is", "pictures are")
    there = plural(report.there, "was", "were")
    if rank.world > 1:
        console.print(f"{drawn} drawn{part_of(rank)}; {there} there.")
    if not report.whole:
        return
    console.quiet = False
    lines = list(report.lines.values())
    if options.layout is None and (path := write_grid(folder, lines)) is not None:
        console.print(f"{path}")
        if (count := sum("file" in line for line in lines)) > grid.MOST:
            console.print(f"It shows the first {grid.MOST} of {count:,} pictures.")
    if options.interpolate is not None and len(strip := [line for line in lines if "file" in line]) > 1:
        for path in write_strip(folder, strip):
            console.print(f"{path}")
    if prompts.blank:
        console.print(
            f"{options.prompts_file}: {plural(prompts.blank, 'blank line is', 'blank lines are')} passed over."
        )
    if report.repeated:
        console.print(
            f"{plural(report.repeated, 'picture was', 'pictures were')} asked for more than once, and drawn once."
        )
    if rank.world > 1:
        console.print(f"All {plural(len(lines), 'picture is', 'pictures are')} listed in {folder / NAME}.")
    elif report.there or report.drawn > SAID_PATHS:
        console.print(f"{drawn} drawn in {folder}; {there} there already.")
    bad = [line for line in lines if "error" in line]
    refused = {f"line {number}: {why}" for number, why in prompts.broken.items()}
    refused |= {line["error"] for line in bad if line["error"] != NOT_FINITE}
    sentences = []
    if refused:
        said = sorted(refused, key=lambda each: int(each.removeprefix("line ").partition(":")[0]))
        for sentence in first_few(said):
            console.print(sentence)
        few = "; ".join(said[:3])
        sentences.append(f"{plural(len(said), 'line')} of {options.prompts_file} not drawn ({few}).")
    if odd := [f"{x['prompt']!r} seed {x['seed']}" for x in bad if x["error"] == NOT_FINITE]:
        sentences.append(not_finite(odd, len(lines), sampling))
    if sentences:
        raise UserError(" ".join(sentences))


def write_layout(prompts: Prompts, options: argparse.Namespace) -> None:
    """What scorers read beside the pictures. Raises UserError where another such file is there."""
    folder = Path(options.out)
    if options.layout == "geneval":
        for line in prompts.lines:
            _write(folder / f"{line.number - 1:05}" / "metadata.jsonl", json.dumps(line.entry))
    if options.layout == "parti":
        _write(folder / "PartiPrompts.tsv", Path(options.prompts_file).read_text(encoding="utf-8-sig"))


def _write(path: Path, text: str) -> None:
    if path.is_file():
        if path.read_text(errors="replace") != text:
            raise UserError(f"{path} is there and says something else; allowed: another --out.")
        return
    with written_whole(path) as unfinished:
        unfinished.write_text(text)
