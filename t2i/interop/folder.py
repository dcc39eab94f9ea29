"""Reading the files of an untrusted folder."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i.errors import CheckpointError
from t2i.interop.reading import read_weights
from t2i.interop.weights import Weights
from t2i.schema import is_unicode
from t2i.weight_file import check_no_page

MAX_TEXT_BYTES = 64 * 2**20


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, both as they are written. A link may not lead out of the folder: what it
    leads to would be copied into what is made of the folder. (In a hub's cache the files of a snapshot are links
    to the folder `blobs` beside `snapshots`: those may.)"""
    path = folder / name
    root, target = (Path(os.path.realpath(each)) for each in (folder, path))  # of a link to itself: itself
    homes = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path} is a link to a file outside {folder}; allowed: files in the folder.")
    return path


def read_bytes(root: Path, name: str) -> bytes:
    """A small file of the folder."""
    path = inside(root, name)
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes; allowed: {MAX_TEXT_BYTES:,} at most."
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def read_json(root: Path, name: str) -> dict[str, Any]:
    """A JSON file of the folder that holds a mapping."""
    text = read_bytes(root, name)
    check_no_page(root / name, text[:512])
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{root / name} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{root / name} holds a {type(values).__name__}; allowed: a mapping.")
    return values


def component_weights(
    root: Path, component: str, stem: str, ema: bool, notes: list[str]
) -> tuple[Weights, Path]:
    """The weights in a folder of a diffusers pipeline, and the file that lists them.

    There may be several: of each variant (STEM.fp16.safetensors, STEM.non_ema.safetensors, ...) one file, or shards
    with an index, as safetensors or as pickles. Full weights are taken before half ones, averaged before others
    unless `ema` is false, safetensors before pickles. Of a variant that was taken `notes` gets a sentence.
    """
    found = _candidates(root / component, stem)
    if not found:
        there = ", ".join(sorted(path.name for path in (root / component).glob("*"))[:5]) or "nothing"
        raise CheckpointError(
            f"{root / component} has no weights; allowed: {stem}.safetensors or {stem}.bin, whole, in shards, or of a "
            f"variant as in {stem}.fp16.safetensors; found: {there}."
        )
    best = min(found, key=lambda each: each.preference(ema))
    where = f"{component}/" if component else ""
    if best.variant:
        notes.append(f"{where}{best.name} was taken: variant {best.variant}.")
    if best.is_index:
        return _sharded(root, where, where + best.name), root / component / best.name
    return read_weights(inside(root, where + best.name)), root / component / best.name


@dataclass(frozen=True)
class Candidate:
    """A file that holds or lists a component's weights. variant: "" for none"""

    name: str
    variant: str
    is_pickle: bool
    is_index: bool

    def preference(self, ema: bool) -> tuple[bool, int, bool, bool, str]:
        """The smallest is the best."""
        raw = "non_ema" in self.variant
        precision = self.variant.replace("non_ema", "").strip("_")
        order = ["", "fp32", "bf16", "fp16"]
        rank = order.index(precision) if precision in order else len(order)
        return raw == ema, rank, self.is_pickle, self.is_index, self.name


def _candidates(folder: Path, stem: str) -> list[Candidate]:
    pattern = re.compile(
        rf"(?:{stem}|pytorch_model)(?:\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?", re.IGNORECASE
    )
    matches = [pattern.fullmatch(path.name) for path in folder.glob("*")]
    return [
        Candidate(match[0], match[1] or match[4] or "", match[2].lower() == "bin", match[3] is not None)
        for match in matches
        if match
    ]


def _sharded(root: Path, where: str, index: str) -> Weights:
    places = read_json(root, index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{root / index} has no weight_map from names to files.")
    kind = ".bin" if ".bin.index." in index.lower() else ".safetensors"
    shards: dict[str, Weights] = {}
    for file in sorted(set(places.values())):
        odd = "\0" in file or not is_unicode(file)
        if odd or Path(file).name != file or not file.endswith(kind):
            raise CheckpointError(
                f"{root / index} names {file!r}; allowed: {kind} files beside it, without a path."
            )
        shards[file] = read_weights(inside(root, where + file))
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{root / index} says that {name} is in {file}, which does not have it.")
    return {name: shards[file][name] for name, file in places.items()}
