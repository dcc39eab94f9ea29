"""Prompts to PNG files, each with the recipe that made it. Knows only the Generator Protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.data.decode import BadSample, decode_image, resize_and_crop
from t2i.errors import ConfigError, UserError
from t2i.few import plural
from t2i.generation import grid
from t2i.generation.batch_size import BatchSize
from t2i.generation.manifest import Line, Manifest
from t2i.generation.names import check_folder, place_of, save_new
from t2i.generation.recipes import Recipe, identity, shared_recipe, together
from t2i.interfaces import Generator, SampleRequest
from t2i.launch.ranks import ALONE, Rank
from t2i.training.pictures import to_pil

NOT_FINITE = "numbers that are not finite"


@dataclass(frozen=True)
class Drawing:
    """Pictures that share all but prompt, seed and what else `request` has one of for each.

    sampling: the family's own options; recipe: what `request` does not say, the same of all
    names: of each its file within the folder, ending in .png
    is_fixed: whether it can have no other name where one is taken
    lines: of each its line in a file of prompts; empty where there is none
    start: of the one picture what `request.image` stands for, read when it is drawn; None: that itself
    """

    request: SampleRequest
    sampling: Any
    recipe: Recipe
    names: Sequence[str]
    is_fixed: bool = False
    lines: Sequence[int] = ()
    start: Callable[[], Tensor] | None = None

    def recipe_of(self, place: int) -> Recipe:
        """Of one picture."""
        own: Recipe = {"prompt": self.request.prompts[place], "seed": self.request.seeds[place]}
        if (between := self.request.between) is not None:
            other: dict[str, Any] = {"share": between.shares[place]}
            if between.prompts is not None:
                other["prompt"] = between.prompts[place]
            if between.seeds is not None:
                other["seed"] = between.seeds[place]
            own["between"] = other
        return {**shared_recipe(self.request, self.recipe), **own}


@dataclass
class Report:
    """What became of the pictures of this process. total: of all processes; there: were there already; repeated: asked
    for more than once, of all
    lines: of all pictures, in the manifest; whole: whether all of them are
    """

    total: int = 0
    drawn: int = 0
    there: int = 0
    repeated: int = 0
    lines: dict[str, Line] = field(default_factory=dict)
    whole: bool = False


class Listener:
    """Is told how drawing goes on.

    share: pictures that this process has to draw, when that is known; steps: done, and all, of those drawn at a time
    """

    def share(self, pictures: int) -> None: ...

    def steps(self, done: int, steps: int) -> None: ...

    def picture(self, path: Path | None) -> None:
        """One is done; None where it is not finite."""


@dataclass(frozen=True)
class _Picture:
    """place: in its drawing; path, is_taken: as `place_of` takes them; key: of its line in the manifest"""

    place: int
    path: Path
    is_taken: bool
    key: str


@dataclass(frozen=True)
class _Block:
    """Of a drawing, what one process has to draw."""

    drawing: Drawing
    pictures: list[_Picture]


def batches(request: SampleRequest, batch_size: int) -> Iterator[SampleRequest]:
    """The request in parts of at most `batch_size` pictures."""
    count = len(request.prompts)
    for start in range(0, count, batch_size):
        yield request.rows(range(start, min(start + batch_size, count)))


def draw(
    generator: Generator, request: SampleRequest, batch_size: int, progress: Callable[[int], None]
) -> Tensor:
    """All pictures of `request`, (N, 3, H, W) in [-1, 1], drawn in batches; progress is called with the
    number of pictures that each batch brought. Raises UserError where one is not finite."""
    parts = []
    for part in batches(request, batch_size):
        parts.append(generator.generate(part))
        progress(len(part.prompts))
    images = torch.cat(parts)
    check_all_finite(request, finite_pictures(images).tolist(), generator.sampling)
    return images


def draw_files(
    generator: Generator,
    drawings: Sequence[Drawing],
    folder: Path,
    batch_size: BatchSize,
    listener: Listener,
    report: Report,
    rank: Rank = ALONE,
) -> None:
    """Draws the pictures that are not there yet, writes each as it is finished, and a line of it into the manifest.
    What is finished stays if a later one fails, or an error or Ctrl-C ends it. In memory there are the pictures of one
    batch.

    Of several processes each draws its own: the pictures are cut into blocks of a batch, which are dealt to them in
    turn, so that where the number at a time is given, each batch is the same on any number of processes.
    report: filled in
    Raises ConfigError for what the model cannot draw, where the picture does not come from a line of a file.
    """
    check_folder(folder)
    manifest = Manifest(folder, rank)
    order: dict[str, int] = {}
    try:
        blocks = list(_own_blocks(drawings, manifest, batch_size, rank, report, order))
        listener.share(sum(len(block.pictures) for block in blocks))
        for block in blocks:
            try:
                _draw_block(generator, block, batch_size, listener, manifest, report)
            except ConfigError as error:
                if not block.drawing.lines:
                    raise
                for picture in block.pictures:
                    why = f"line {block.drawing.lines[picture.place]}: {str(error).removesuffix('.')}"
                    manifest.add(picture.key, block.drawing.recipe_of(picture.place), error=why)
    finally:
        report.lines = manifest.close(order)
    report.whole = len(report.lines) == len(order)


def _own_blocks(
    drawings: Sequence[Drawing],
    manifest: Manifest,
    batch_size: BatchSize,
    rank: Rank,
    report: Report,
    order: dict[str, int],
) -> Iterator[_Block]:
    """What is missing of the share of this process. order: filled with the keys of all pictures, as they come"""
    taken: set[str] = set()
    size = batch_size.block(sum(len(drawing.names) for drawing in drawings), rank.world)
    number = -1
    for drawing in drawings:
        for start in range(0, len(drawing.names), size):
            number += 1
            missing = []
            for place in range(start, min(len(drawing.names), start + size)):
                name, recipe = drawing.names[place], drawing.recipe_of(place)
                known_by = identity(recipe)
                key = f"{known_by[:32]} {name}" if drawing.is_fixed else known_by[:32]
                if key in order:
                    report.repeated += 1
                    continue
                order[key] = len(order)
                if number % rank.world == rank.rank:
                    wanted, is_taken = manifest.folder / name, name in taken
                    path, is_there = place_of(wanted, known_by, drawing.is_fixed, is_taken)
                    if not is_there:
                        missing.append(_Picture(place, wanted, is_taken, key))
                    else:
                        report.there += 1
                        if key not in manifest:
                            manifest.add(key, recipe, path)
                taken.add(name)
            if missing:
                yield _Block(drawing, missing)
    report.total = len(order)


def _draw_block(
    generator: Generator,
    block: _Block,
    batch_size: BatchSize,
    listener: Listener,
    manifest: Manifest,
    report: Report,
) -> None:
    drawing = block.drawing
    generator.sampling = drawing.sampling
    request = drawing.request.rows([picture.place for picture in block.pictures])
    if drawing.start is not None:
        request = replace(request, image=drawing.start())
    for places, images in batch_size.parts(request, lambda part: generator.generate(part, listener.steps)):
        finite = finite_pictures(images).tolist()
        for i, image, good in zip(places, images, finite, strict=True):
            picture = block.pictures[i]
            recipe = drawing.recipe_of(picture.place)
            path = None
            if good:
                path, is_there = save_new(
                    to_pil(image), picture.path, recipe, drawing.is_fixed, picture.is_taken
                )
                manifest.add(picture.key, recipe, path)
                report.there += is_there  # by another process
                report.drawn += not is_there
            else:
                manifest.add(picture.key, recipe, error=NOT_FINITE)
            listener.picture(path)


def write_grid(folder: Path, lines: Iterable[Line]) -> Path | None:
    """grid.png, of the first `grid.MOST` pictures, captioned, with the recipes of all on it; None where there are fewer
    than two. lines: of the manifest"""
    shown = list(islice((line for line in lines if "file" in line), grid.MOST))
    if len(shown) < 2:
        return None
    recipe = together([{**line["recipe"], "prompt": line["prompt"], "seed": line["seed"]} for line in shown])
    path, is_there = place_of(folder / "grid.png", identity(recipe), is_fixed=False)
    if not is_there:
        paths = [folder / line["file"] for line in shown]
        sheet = grid.captioned_grid(paths, [line["prompt"] for line in shown])
        path, _ = save_new(sheet, folder / "grid.png", recipe)
    return path


def finite_pictures(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N,) bool: which hold neither NaN nor infinity."""
    return images.isfinite().flatten(1).all(1)


def check_all_finite(request: SampleRequest, finite: Sequence[bool], sampling: Any) -> None:
    """Raises UserError that names the pictures which are not. sampling: the generator's options"""
    bad = [i for i, good in enumerate(finite) if not good]
    if bad:
        described = [f"{request.prompts[i]!r} seed {request.seeds[i]}" for i in bad]
        raise UserError(not_finite(described, len(finite), sampling))


def not_finite(bad: Sequence[str], pictures: int, sampling: Any) -> str:
    """A sentence that names the pictures which are not.

    bad: prompts and seeds; pictures: of which they are; sampling: the generator's options
    """
    named = [*bad[:3]] + ["..."] * (len(bad) > 3)
    options = ", ".join(f"sampling.{name}={value}" for name, value in vars(sampling).items())
    return (
        f"{len(bad)} of {plural(pictures, 'picture')} came out with numbers that are not finite and were not written "
        f"({', '.join(named)}); with other options they may be finite (here: {options or 'none'})."
    )


def read_image(path: Path, size_px: tuple[int, int], ground: str = "white") -> Tensor:
    """(3, H, W) in [-1, 1]: a picture file, resized until it just covers `size_px` (H, W) and cut to its middle.
    ground: the colour that shows where it is transparent
    Raises UserError for a file that is not there or is no picture."""
    try:
        image, original = decode_image(path.read_bytes(), str(path), size_px, ground=ground)
    except OSError as error:
        raise UserError(f"The picture {path} cannot be read: {error.strerror}.") from error
    except BadSample as error:
        raise UserError(f"{path} is not a picture that can be read: {error.detail}.") from error
    return resize_and_crop(image, original, size_px)[0].float() / 127.5 - 1
