"""Where jobs put what they make of each shard: beside it, or in a folder of their own."""

from __future__ import annotations

import errno
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from t2i.data.sources import beside, is_local, local_path, stem
from t2i.errors import ConfigError
from t2i.files import made_folder, named


def places(urls: Sequence[str], suffix: str, out: Path | None) -> dict[str, Path]:
    """Shard -> the file `00000` + `suffix` beside it, or in the folder `out`. Raises ConfigError where there is no such
    place, or several shards would have one."""
    found: dict[str, Path] = {}
    for url in urls:
        if out is not None:
            found[url] = out / (stem(url) + suffix)
        elif is_local(url):
            found[url] = local_path(beside(url, suffix))
        else:
            raise ConfigError(
                f"What is made of {url} cannot be written beside it; name a folder with --out, to upload it from there."
            )
    names = [place.name if out is not None else str(place) for place in found.values()]
    if same := first_same(names, fold=out is not None):
        one, other = (list(found)[at] for at in same)
        raise ConfigError(f"{one} and {other} would both have {found[other]}; name one at a time.")
    return found


def first_same(names: Iterable[str], fold: bool = True) -> tuple[int, int] | None:
    """The places of the first two names that are one file.
    fold: also where they differ in case or in how accents are spelt, as on macOS and Windows they then are one"""
    seen: dict[str, int] = {}
    for at, name in enumerate(names):
        known_by = unicodedata.normalize("NFC", name).casefold() if fold else name
        if (before := seen.setdefault(known_by, at)) != at:
            return before, at
    return None


def printable(text: str) -> str:
    """With ? for what UTF-8 does not have, as in names of files."""
    return text.encode(errors="replace").decode()


def check_writable(path: Path) -> None:
    """Raises OSError where nothing can be written at `path`: before the work is done rather than after."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with made_folder(path.parent), named(path), tempfile.TemporaryFile(dir=path.parent):
        pass
