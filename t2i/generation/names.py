"""Where pictures go: names of files, and which of them are there already."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import Path

from PIL import Image

from t2i.errors import UserError
from t2i.generation.prompts import Line
from t2i.generation.recipes import Recipe, chunk, found_in, identity
from t2i.training.pictures import save_picture

MAX_SLUG = 60  # bytes
TAKEN = "{} is there and is not the picture that this recipe makes; allowed: an --out without that file."


def slug(prompt: str) -> str:
    """The words of the prompt, in any script, as part of a file name of at most MAX_SLUG bytes: in lower case, as some
    systems take A and a for the same. One that is too long ends in a digest of the whole prompt, so that prompts with
    the same beginning have names of their own; one without a word is the digest."""
    name = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt.lower())).strip("-")
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    if len(name.encode()) > MAX_SLUG:
        name = f"{name.encode()[: MAX_SLUG - 9].decode(errors='ignore').strip('-')}-{digest}"
    return name or (digest if prompt else "empty")


def file_name(layout: str | None, line: Line, seed: int, number: int) -> str:
    """The file of a line's picture within its folder.

    layout: None: by prompt and seed; "geneval": in a folder for each line, as GenEval's evaluate_images.py reads them;
        "parti": by the row, from 0, of PartiPrompts.tsv
    number: which of the line's pictures, from 0
    """
    if layout == "geneval":
        return f"{line.number - 1:05}/samples/{number:04}.png"
    if layout == "parti":  # the first line has the names of the columns
        return f"{line.number - 2:05}{f'_{number:02}' if number else ''}.png"
    return f"{slug(line.prompt)}_{seed}.png"


def place_of(path: Path, known_by: str, is_fixed: bool, is_taken: bool = False) -> tuple[Path, bool]:
    """The file for a picture, and whether it is there: `path`, or where that is another picture's, a name with a part
    of `known_by` in it, so that nothing is ever written over and each process finds the same names.

    known_by: the picture's `t2i.generation.recipes.identity`
    is_fixed: there is no other name for it. Raises UserError where that is another picture's
    is_taken: whether an earlier picture of the list has that name
    """
    others = [] if is_fixed else [path.with_stem(f"{path.stem}-{known_by[:n]}") for n in (8, 64)]
    places = [path, *others]
    free = []
    for place in places:
        if not os.path.lexists(place):
            free.append(place)
        elif (recipe := found_in(place)) is not None and identity(recipe) == known_by:
            return place, True
    own = [place for place in free if place != path or not is_taken]
    if not own:
        raise UserError(TAKEN.format(path))
    return own[0], False


def check_free(path: Path, known: Recipe) -> None:
    """Raises UserError, as `place_of` does for one that is fixed, where `path` is there and has other entries in its
    recipe than those that are `known` before the model is loaded."""
    if os.path.lexists(path):
        found = found_in(path) or {}
        if any(found.get(name) != value for name, value in known.items()):
            raise UserError(TAKEN.format(path))


def save_new(
    picture: Image.Image, path: Path, recipe: Recipe, is_fixed: bool = False, is_taken: bool = False
) -> tuple[Path, bool]:
    """Writes the picture with its recipe to the place that `place_of` says, whatever other processes write at the
    same time; returns it, and whether the picture is there already. Raises UserError as `place_of` does."""
    while True:
        place, is_there = place_of(path, identity(recipe), is_fixed, is_taken)
        if is_there:
            return place, True
        try:
            save_picture(picture, place, is_new=True, **chunk(recipe))
        except FileExistsError:
            continue
        return place, False


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
