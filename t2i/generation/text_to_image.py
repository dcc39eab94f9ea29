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
            request, prompts=request.prompts[start:end], seeds=request.seeds[start:end]
        )
        parts.append(generator.generate(part))
        progress(len(part.prompts))
    return torch.cat(parts)


def save(images: Tensor, request: SampleRequest, folder: Path, recipe: dict[str, Any]) -> list[Path]:
    """Writes one PNG per picture, named by prompt and seed, and grid.png where there are several. Each holds
    its recipe: `recipe` and what the request says of that picture. Earlier files are never written over."""
    shared = recipe | {
        key: value for key, value in dataclasses.asdict(request).items() if key not in ("prompts", "seeds")
    }
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
