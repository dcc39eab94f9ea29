"""Prompts to PNG files, each with the recipe that made it. Knows only the Generator Protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.data.decode import BadSample, decode_image, resize_and_crop
from t2i.errors import UserError
from t2i.interfaces import Generator, SampleRequest
from t2i.training.pictures import grid, save_png

RECIPE_KEY = "t2i"  # the PNG text chunk that holds the recipe as JSON


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
    request: SampleRequest,
    batch_size: int,
    folder: Path,
    recipe: dict[str, Any],
    progress: Callable[[int], None],
) -> Iterator[Path]:
    """Draws as `draw` does and writes as `save` does, batch by batch, so that what is finished stays if a later one
    fails; then grid.png. Pictures that are not finite are not written: UserError then names them at the end."""
    check_folder(folder)
    finite: list[bool] = []
    drawn = []
    for part in batches(request, batch_size):
        images = generator.generate(part)
        good = finite_pictures(images).tolist()
        drawn.append(images[good])
        yield from save(images[good], _chosen(part, good), folder, recipe)
        finite += good
        progress(len(part.prompts))
    if sum(finite) > 1:
        yield save_grid(torch.cat(drawn), _chosen(request, finite), folder, recipe)
    check_all_finite(request, finite, generator.sampling)


def finite_pictures(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N,) bool: which hold neither NaN nor infinity."""
    return images.isfinite().flatten(1).all(1)


def check_all_finite(request: SampleRequest, finite: list[bool], sampling: Any) -> None:
    """Raises UserError that names the pictures which are not. sampling: the generator's options"""
    bad = [i for i, good in enumerate(finite) if not good]
    if bad:
        named = [f"{request.prompts[i]!r} seed {request.seeds[i]}" for i in bad[:3]] + ["..."] * (
            len(bad) > 3
        )
        options = ", ".join(f"sampling.{name}={value}" for name, value in vars(sampling).items())
        raise UserError(
            f"{len(bad)} of {len(finite)} pictures came out with numbers that are not finite and were not written "
            f"({', '.join(named)}); with other options they may be finite (here: {options or 'none'})."
        )


def _chosen(request: SampleRequest, good: list[bool]) -> SampleRequest:
    """The request for some of its pictures."""
    return request.rows([i for i, each in enumerate(good) if each])


def save(images: Tensor, request: SampleRequest, folder: Path, recipe: dict[str, Any]) -> list[Path]:
    """Writes one PNG per picture, named by prompt and seed. Each holds its recipe: `recipe` and what the request
    says of that picture. Earlier files are never written over."""
    paths = []
    for image, prompt, seed in zip(images, request.prompts, request.seeds, strict=True):
        path = unused(folder / f"{slug(prompt)}_{seed}.png")
        made_by = shared_recipe(request, recipe) | {"prompt": prompt, "seed": seed}
        save_png(image, path, **{RECIPE_KEY: json.dumps(made_by)})
        paths.append(path)
    return paths


def save_grid(images: Tensor, request: SampleRequest, folder: Path, recipe: dict[str, Any]) -> Path:
    """Writes all pictures as one, grid.png, with the recipe of all."""
    path = unused(folder / "grid.png")
    everything = {"prompts": list(request.prompts), "seeds": list(request.seeds)}
    made_by = shared_recipe(request, recipe) | everything
    save_png(grid(images, min(len(images), 8)), path, **{RECIPE_KEY: json.dumps(made_by)})
    return path


def shared_recipe(request: SampleRequest, recipe: dict[str, Any]) -> dict[str, Any]:
    """`recipe` and what the request says of all its pictures."""
    own = {"prompts", "seeds", "image", "mask", "noise", "between"}
    own |= {"strength"} if request.image is None else set()
    own |= set() if request.tile else {"tile"}
    names = [field.name for field in dataclasses.fields(request) if field.name not in own]
    return recipe | {name: getattr(request, name) for name in names}


def check_folder(folder: Path) -> None:
    """Raises UserError where no file can be written into `folder`, which need not be there yet: better before the
    pictures are drawn than after."""
    there = next(
        place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink()
    )
    if not there.is_dir():
        raise UserError(f"The folder {folder} cannot be made: {there} is not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"The folder {folder} cannot be written to: {there} is read-only.")


def read_image(path: Path, size_px: tuple[int, int]) -> Tensor:
    """(3, H, W) in [-1, 1]: a picture file, resized until it just covers `size_px` (H, W) and cut to its middle.
    Raises UserError for a file that is not there or is no picture."""
    try:
        image, original = decode_image(path.read_bytes(), str(path), size_px)
    except OSError as error:
        raise UserError(f"The picture {path} cannot be read: {error.strerror}.") from error
    except BadSample as error:
        raise UserError(f"{path} is not a picture that can be read: {error}.") from error
    return resize_and_crop(image, original, size_px)[0].float() / 127.5 - 1


def slug(prompt: str, length: int = 60) -> str:
    """The prompt as part of a file name: in lower case, as some systems take A and a for the same. One that is too
    long ends in a digest of the whole prompt, so that prompts with the same beginning have names of their own."""
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if len(name) > length:
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        name = f"{name[: length - 9].strip('-')}-{digest}"
    return name or "empty"


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    candidate, copy = path, 1
    while candidate.exists():
        copy += 1
        candidate = path.with_stem(f"{path.stem}-{copy}")
    return candidate
