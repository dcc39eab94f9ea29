"""Prompts to PNG files, each with the recipe that made it. Knows only the Generator Protocol."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.data.decode import BadSample, decode_image, resize_and_crop
from t2i.errors import UserError
from t2i.interfaces import Generator, SampleRequest
from t2i.training.pictures import grid, save_png

RECIPE_KEY = "t2i"  # the PNG text chunk that holds the recipe as JSON


def draw(
    generator: Generator, request: SampleRequest, batch_size: int, progress: Callable[[int], None]
) -> Tensor:
    """All pictures of `request`, (N, 3, H, W) in [-1, 1], drawn in batches; progress is called with the
    number of pictures that each batch brought."""
    parts = []
    for start in range(0, len(request.prompts), batch_size):
        end = start + batch_size
        part = dataclasses.replace(
            request,
            prompts=request.prompts[start:end],
            seeds=request.seeds[start:end],
            image=None if request.image is None else request.image[start:end],
        )
        parts.append(generator.generate(part))
        progress(len(part.prompts))
    return torch.cat(parts)


def save(images: Tensor, request: SampleRequest, folder: Path, recipe: dict[str, Any]) -> list[Path]:
    """Writes one PNG per picture, named by prompt and seed, and grid.png where there are several. Each holds
    its recipe: `recipe` and what the request says of that picture. Earlier files are never written over."""
    own = {"prompts", "seeds", "image"} | ({"strength"} if request.image is None else set())
    names = [field.name for field in dataclasses.fields(request) if field.name not in own]
    shared = recipe | {name: getattr(request, name) for name in names}
    paths = []
    for image, prompt, seed in zip(images, request.prompts, request.seeds, strict=True):
        path = unused(folder / f"{slug(prompt)}_{seed}.png")
        save_png(image, path, **{RECIPE_KEY: json.dumps(shared | {"prompt": prompt, "seed": seed})})
        paths.append(path)
    if len(images) > 1:
        path = unused(folder / "grid.png")
        columns = min(len(images), 8)
        everything = shared | {"prompts": list(request.prompts), "seeds": list(request.seeds)}
        save_png(grid(images, columns), path, **{RECIPE_KEY: json.dumps(everything)})
        paths.append(path)
    return paths


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
    """The prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:length].strip("-") or "empty"


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    candidate, copy = path, 1
    while candidate.exists():
        copy += 1
        candidate = path.with_stem(f"{path.stem}-{copy}")
    return candidate
