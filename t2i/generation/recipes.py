"""What a picture was made by: the recipe in its file, from which it is made again and known as there already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from t2i.errors import UserError
from t2i.interfaces import SampleRequest

RECIPE_KEY = "t2i"  # the PNG text chunk that holds the recipe as JSON
LAST_CHUNK = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# What says where the weights and files lay and how many pictures were drawn together, and not which picture this is.
BESIDE = {"checkpoint", "codec", "batch", "image", "mask", "video", "clip"}
Recipe = dict[str, Any]


def shared_recipe(request: SampleRequest, recipe: Mapping[str, Any]) -> Recipe:
    """`recipe` and what the request says of all its pictures."""
    said = {each.name: getattr(request, each.name) for each in dataclasses.fields(request)}
    if request.image is None:
        del said["strength"]
    if not request.tile:
        del said["tile"]
    shared = {name: value for name, value in said.items() if isinstance(value, str | int | float)}
    return {**recipe, **shared}


def identity(recipe: Mapping[str, Any]) -> str:
    """A digest that pictures share which are the same: 64 hexadecimal digits."""
    kept = {name: value for name, value in recipe.items() if name not in BESIDE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def of_files(**files: str | Path | None) -> Recipe:
    """What a recipe says of the files that a picture started from, or folders of files: where each lay, and as
    NAME_sha256 what was in it."""
    said: Recipe = {}
    for name, path in files.items():
        if path is not None:
            said |= {name: str(path), f"{name}_sha256": content_digest(Path(path))}
    return said


def check_files(recipe: Mapping[str, Any], *names: str) -> None:
    """Raises UserError where one of those files is another than the recipe says."""
    for name in names:
        path, digest = recipe.get(name), recipe.get(f"{name}_sha256")
        if path and digest and Path(str(path)).is_file() and content_digest(Path(str(path))) != digest:
            raise UserError(f"{path} is no longer what the recipe was drawn from: name another by --{name}.")


def differences(then: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Why another picture would come of the recipe `then` than it says, where a model is what `here` says."""
    return [
        f"{name} {then[name]!r}, and {what} here {here[name]!r}: another picture will come of it"
        for name, what in {"weights": "the weights are", "precision": "the precision is"}.items()
        if then.get(name) not in (None, here[name])
    ]


def content_digest(path: Path) -> str:
    """16 hexadecimal digits that tell a file, or all in a folder, from every other."""
    digest = hashlib.sha256()
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        if each.is_file():
            digest.update(hashlib.sha256(each.read_bytes()).digest())
    return digest.hexdigest()[:16]


def weights_digest(weights: Mapping[str, Tensor], changes: Iterable[str] = ()) -> str:
    """16 hexadecimal digits that tell a checkpoint from every other, wherever it lies.

    changes: to its configuration, key=value
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    digest.update("\n".join(sorted(changes)).encode())
    return digest.hexdigest()[:16]


def found_in(path: Path) -> Recipe | None:
    """The recipe in a PNG of ours that is there whole; None for any other file and where there is none."""
    try:
        if not (path.is_file() and _ends(path)):  # a pipe would never answer
            return None
        with Image.open(path, formats=["PNG"]) as picture:
            found = json.loads(picture.info.get(RECIPE_KEY, "null"))
        json.dumps(found, allow_nan=False, ensure_ascii=False).encode()  # as all that we write
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _ends(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(LAST_CHUNK)))
        return file.read() == LAST_CHUNK


def chunk(recipe: Mapping[str, Any]) -> dict[str, str]:
    """As `t2i.training.pictures.save_png` takes it."""
    return {RECIPE_KEY: json.dumps(recipe)}


def together(recipes: Sequence[Mapping[str, Any]]) -> Recipe:
    """Of several pictures in one file: what all have in common, and under "pictures" what each has of its own."""
    first = recipes[0]
    common = {
        name: value
        for name, value in first.items()
        if name not in ("prompt", "seed") and all(each.get(name, _NONE) == value for each in recipes)
    }
    own = [{name: value for name, value in each.items() if name not in common} for each in recipes]
    return {**common, "pictures": own}


_NONE = object()


def read(path: Path) -> list[Recipe]:
    """The recipes of the pictures in a file that `t2i sample` wrote, in their order. Raises UserError where there is no
    such file or recipe; nothing else about them is checked."""
    if not path.is_file():
        raise UserError(f"--recipe is {str(path)!r}; allowed: a file that exists.")
    found = found_in(path)
    if found is None:
        raise UserError(
            f"{path} holds no recipe: it is not a whole PNG that t2i sample wrote, or another program wrote it anew."
        )
    pictures = found.pop("pictures", [{}])
    if not isinstance(pictures, list) or not all(isinstance(each, dict) for each in pictures) or not pictures:
        raise UserError(f"{path} has a recipe whose entry pictures is not a list of pictures.")
    return [{**found, **each} for each in pictures]
