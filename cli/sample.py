"""`t2i sample`: draws pictures for prompts with a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.config import check
from t2i.errors import ConfigError, UserError
from t2i.few import plural
from t2i.generation.extension import check_whole
from t2i.generation.prompts import Line, Prompts, read_prompts
from t2i.launch.ranks import rank_of

from . import sample_edit, sample_video
from .arguments import launch_of, parse_with_overrides
from .generators import CODEC, Loaded, device_named, load, weights_path
from .sample_flags import as_overrides, check_flags, check_same_kind, filled, parser, take_recipes
from .submit import submit_shared

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from t2i.generation.text_to_image import Drawing
    from t2i.interfaces import Between, Generator, SampleRequest


def run(arguments: list[str]) -> None:
    """Parses, loads, draws, writes PNGs and says where."""
    launch, arguments = launch_of(parser(), arguments)
    options, overrides = parse_with_overrides(parser(), arguments)
    check_flags(options)
    prompts = asked(options, overrides)
    if not prompts.lines:
        number, why = next(iter(prompts.broken.items()))
        raise UserError(f"No line of {options.prompts_file} can be used (line {number}: {why}).")
    if launch is not None:
        if options.checkpoint is None:  # all processes draw with the weights that are the newest now
            arguments = [*arguments, "--checkpoint", str(weights_path(None, options.runs_dir))]
        submit_shared(["sample"], arguments, launch)
        return
    # Heavy imports only now: a wrong flag is reported at once.
    from t2i.generation.batch_size import BatchSize
    from t2i.generation.names import check_folder, check_free, file_name
    from t2i.generation.recipes import of_files
    from t2i.generation.text_to_image import Report, draw_files
    from t2i.schema import to_dict

    from .console import console, say_what_is_logged
    from .sample_bar import (
        Bar,
        conclude,
        say_what_differs,
        say_what_is_cut,
        say_what_is_large,
        write_layout,
    )

    say_what_is_logged()
    rank = rank_of(os.environ)
    device = device_named(options.device, rank)
    on_cpu = device.type == "cpu" and options.precision not in (None, "auto", "32-true")
    check(not on_cpu or options.recipe is not None, "--precision", options.precision, "32-true on a CPU")
    path = weights_path(options.checkpoint, options.runs_dir)
    folder = Path(options.out)
    check_folder(folder)
    first = prompts.lines[0]
    if options.video is not None:
        sample_video.check_out(first, options, sample_edit.strength_of(options))
    if options.layout is not None:
        name = file_name(options.layout, first, first.seed or 0, 0)
        check_free(folder / name, {"prompt": first.prompt, "seed": first.seed or 0})
    changes = [*as_overrides(options), *overrides]
    loaded = load(path, device, changes, options.precision)
    generator = loaded.generator
    check_same_kind(prompts.lines, options, path, generator.sampling)
    recipe: dict[str, Any] = {
        "checkpoint": str(path),
        "weights": loaded.weights,
        "precision": generator.precision,
    }
    if any(CODEC.match(each) for each in changes):
        recipe["codec"] = loaded.config["builds_on"]["codec"]
    say_what_differs(options, recipe)
    if options.compile:
        generator.compile()
    recipe |= {"compile": True} if options.compile else {}
    if options.rerank is not None:
        generator = reranked(generator, options, device)
        loaded = dataclasses.replace(loaded, generator=generator)
        recipe |= {"rerank": options.rerank, **of_files(clip=options.clip)}
    film = None if options.video is None else sample_video.Film(first, options, generator)
    if film is None:
        drawings = grouped(prompts, options, loaded, recipe)
    else:
        sampling = loaded.sampling({})
        recipe["sampling"] = to_dict(sampling)
        drawings = film.drawings(first, sample_edit.strength_of(options), sampling, recipe)
    if rank.rank == 0:
        write_layout(prompts, options)
    say_what_is_cut(loaded.text, prompts, options)
    say_what_is_large(drawings, generator)
    console.print(f"Drawing with {path}")
    report = Report()
    try:
        with Bar(rank) as bar:
            batch_size = BatchSize(options.batch_size, device)
            draw_files(generator, drawings, folder, batch_size, bar, report, rank)
    except KeyboardInterrupt:
        kept = report.drawn + report.there
        if kept:
            kept_now = f"{plural(kept, 'picture is', 'pictures are')} kept in {folder}"
            console.print(f"{kept_now}: the same command goes on from there.")
        else:
            console.print("No picture was finished.")
        raise
    conclude(report, prompts, options, rank, generator.sampling)
    if film is not None and (said := film.finish(report)) is not None:
        console.print(said)


def reranked(generator: Generator, options: argparse.Namespace, device: torch.device) -> Generator:
    """One that draws --rerank candidates for each picture. Raises ConfigError or CheckpointError where --clip names
    none."""
    import torch

    from t2i.evaluation.clip import load_clip
    from t2i.evaluation.features import clip_scores
    from t2i.generation.reranking import Reranked

    clip = load_clip(options.clip, None, device, with_text=True)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            return clip_scores(clip, clip.features_of_drawn(images, device).cpu(), prompts, device)

    return Reranked(generator, options.rerank, score)


def asked(options: argparse.Namespace, overrides: Sequence[str]) -> Prompts:
    """The prompts, from where the flags say, each with what else is said of it. Raises UserError."""
    if options.prompts_file is not None:
        found = read_prompts(Path(options.prompts_file), other_keys=options.layout == "geneval")
    elif options.recipe is not None:
        found = Prompts(take_recipes(options, overrides), {}, 0)
    else:
        found = Prompts([Line(prompt) for prompt in options.prompt], {}, 0)
    lines = []
    for line in found.lines:
        try:
            lines.append(filled(line, options))
        except ConfigError as error:  # a seed whose pictures would go beyond the last one
            if not line.number:
                raise
            found.broken[line.number] = str(error).removesuffix(".")
    return Prompts(sample_edit.between(lines, options), found.broken, found.blank)


def grouped(
    prompts: Prompts,
    options: argparse.Namespace,
    loaded: Loaded,
    recipe: dict[str, Any],
) -> list[Drawing]:
    """The pictures of all lines; those that share what can be shared are drawn together. A line of a file with what
    there is not is put among the broken ones."""
    from t2i.generation.recipes import of_files

    files = of_files(image=options.image, mask=options.mask)
    groups: dict[str, list[Line]] = {}
    for line in prompts.lines:
        own = json.dumps(line.sampling, sort_keys=True)
        key = json.dumps([line.height, line.width, line.negative_prompt, own, sorted(line.between)])
        groups.setdefault(key, []).append(line)
    drawings = []
    chosen: dict[str, Any] = {}
    for lines in groups.values():
        own = json.dumps(lines[0].sampling, sort_keys=True)
        try:
            if own not in chosen:
                chosen[own] = loaded.sampling(lines[0].sampling)
            drawings.append(together(lines, chosen[own], options, loaded.generator, {**recipe, **files}))
        except ConfigError as error:
            if not options.prompts_file:
                raise
            prompts.broken.update((line.number, str(error).removesuffix(".")) for line in lines)
    return drawings


def together(
    lines: Sequence[Line],
    sampling: Any,
    options: argparse.Namespace,
    generator: Generator,
    recipe: dict[str, Any],
) -> Drawing:
    """The pictures of lines that share all but prompt, seed and number. Raises ConfigError."""
    from t2i.generation.names import file_name
    from t2i.generation.text_to_image import Drawing
    from t2i.schema import to_dict

    pictures = [(line, i) for line in lines for i in range(line.num_images or 1)]
    names = [file_name(options.layout, line, (line.seed or 0) + i, i) for line, i in pictures]
    numbers = [line.number for line, _ in pictures] if options.prompts_file else []
    request = request_of(
        [line.prompt for line, _ in pictures],
        [(line.seed or 0) + i for line, i in pictures],
        lines[0],
        options,
        generator,
        sampling,
    )
    if options.extend is not None and (lines[0].height, lines[0].width) == (None, None):
        extend = sample_edit.parse_extension(options.extend)
        check_whole(generator, request, sampling, extend, "--height {} --width {}")
    if lines[0].between:
        request = dataclasses.replace(request, between=other_ends([line for line, _ in pictures]))
    if not options.prompts_file:  # of a file the other lines are drawn, and the manifest says why one is not
        generator.check(request, sampling)
    made_by = {**recipe, "sampling": to_dict(sampling)}
    for name in ("extend", "invert"):
        if (value := getattr(options, name)) is not None:
            made_by[name] = value
    return Drawing(request, sampling, made_by, names, options.layout is not None, numbers)


def request_of(
    prompts: list[str],
    seeds: list[int],
    line: Line,
    options: argparse.Namespace,
    generator: Generator,
    sampling: Any,
) -> SampleRequest:
    """For pictures that share what `line` says but for the prompt and the seed."""
    from t2i.interfaces import SampleRequest

    side = generator.default_size_px
    start, noise = sample_edit.start_of(line, options, side), None
    if start is not None and options.invert is not None:
        noise = sample_edit.inverted(generator, sampling, start, options.invert, line.negative_prompt or "")
    size = (line.height or side, line.width or side) if start is None else start.size_px

    def repeated(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.expand(len(prompts), *value.shape[-3:])

    return SampleRequest(
        prompts=prompts,
        seeds=seeds,
        height_px=size[0],
        width_px=size[1],
        negative_prompt=line.negative_prompt or "",
        image=None if start is None or noise is not None else repeated(start.image),
        strength=sample_edit.strength_of(options),
        mask=None if start is None else repeated(start.mask),
        noise=repeated(noise),
        tile=options.tile or "",
    )


def other_ends(lines: Sequence[Line]) -> Between:
    """Of lines that all lie between two pictures."""
    from t2i.interfaces import Between

    others = [line.between for line in lines]
    prompts, seeds = (
        [each[key] for each in others] if key in others[0] else None for key in ("prompt", "seed")
    )
    return Between([each["share"] for each in others], prompts, seeds)
