"""manifest.jsonl: a line for each picture in a folder, written as the pictures are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from t2i.files import named, written_whole
from t2i.launch.lock import locked
from t2i.launch.ranks import Rank

NAME = "manifest.jsonl"
PATIENCE_S = 600.0  # until it is this process's turn
Line = dict[str, Any]


class Manifest:
    """Each process of several writes lines to a file of its own, which become part of the one manifest when it ends;
    who comes last finds all of them there. No process waits for another.

    A line has "id", the same for the same picture everywhere, "file", its path within the folder, "prompt", "seed" and
    "recipe"; one that could not be drawn has "error" and no "file".
    """

    def __init__(self, folder: Path, rank: Rank) -> None:
        self.folder = folder
        self._alone = rank.world == 1
        own = NAME if self._alone else f"manifest-{rank.rank}-of-{rank.world}.jsonl"
        self._path = folder / own
        folder.mkdir(parents=True, exist_ok=True)
        self._listed = {known_by for known_by, line in _lines(folder / NAME) if "file" in line}
        if not self._alone:
            self._path.unlink(missing_ok=True)
        self._added: dict[str, Line] = {}
        self._file: TextIO | None = None

    def __contains__(self, known_by: str) -> bool:
        return known_by in self._listed

    def add(
        self, known_by: str, recipe: Mapping[str, Any], path: Path | None = None, error: str = ""
    ) -> None:
        """path: of a picture; error: why there is none"""
        rest = {name: value for name, value in recipe.items() if name not in ("prompt", "seed")}
        what = {"file": path.relative_to(self.folder).as_posix()} if path else {"error": error}
        line = {"id": known_by, **what, "prompt": recipe["prompt"], "seed": recipe["seed"], "recipe": rest}
        self._added[known_by] = line
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
            if _is_cut(self._path):
                self._file.write("\n")
        with named(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self, order: Mapping[str, int]) -> dict[str, Line]:
        """Puts the lines into the one manifest, those of `order` last and in that order; returns these, as far as they
        are there, by id."""
        if self._file is not None:
            with named(self._path):
                self._file.close()
        elif not (self.folder / NAME).is_file():
            return {}
        with locked(self.folder, PATIENCE_S):
            # Another process may have put a manifest of its own in the place of the one that this process wrote to.
            found = dict(_lines(self.folder / NAME)) | self._added
            listed = sorted(found.items(), key=lambda entry: order.get(entry[0], -1))
            with written_whole(self.folder / NAME) as unfinished:
                unfinished.write_text("".join(json.dumps(line) + "\n" for _, line in listed))
            if not self._alone:
                self._path.unlink(missing_ok=True)
        return {known_by: line for known_by, line in listed if known_by in order}


def _lines(path: Path) -> Iterator[tuple[str, Line]]:
    """Those that are whole, with their ids; of one id the last counts."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                yield str(line["id"]), line
            except (ValueError, KeyError, TypeError, RecursionError):
                continue


def _is_cut(path: Path) -> bool:
    """Whether a process was stopped in the middle of its last line."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return False
        file.seek(-1, 2)
        return file.read() != b"\n"
