"""Reading the files of a folder that a stranger made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from t2i.errors import CheckpointError
from t2i.interop.reading import only_weights, read_pickle, read_safetensors
from t2i.interop.weights import Weights

MAX_TEXT_BYTES = 64 * 2**20


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, both as they are written. A link may not lead out of the folder: what it
    leads to would be copied into what is made of the folder. (In a hub's cache the files of a snapshot are links
    to the folder `blobs` beside `snapshots`: those may.)"""
    path = folder / name
    root = folder.resolve()
    target = path.resolve()
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
    try:
        values = json.loads(read_bytes(root, name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{root / name} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{root / name} holds a {type(values).__name__}; allowed: a mapping.")
    return values


def component_weights(root: Path, component: str, stem: str) -> tuple[Weights, Path]:
    """The weights in a folder of a diffusers pipeline, and the file that lists them: STEM.safetensors, its
    shards, or else the pickle STEM.bin."""
    where = f"{component}/" if component else ""
    whole = f"{where}{stem}.safetensors"
    if (root / whole).exists():
        return read_safetensors(inside(root, whole))[0], root / whole
    index = f"{where}{stem}.safetensors.index.json"
    if (root / index).exists():
        return _sharded(root, where, index), root / index
    for name in (f"{where}{stem}.bin", f"{where}pytorch_model.bin"):
        if (root / name).exists():
            return only_weights(read_pickle(inside(root, name))), root / name
    raise CheckpointError(f"{root / component} has no weights; allowed: {stem}.safetensors or {stem}.bin.")


def _sharded(root: Path, where: str, index: str) -> Weights:
    places = read_json(root, index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{root / index} has no weight_map from names to files.")
    shards: dict[str, Weights] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{root / index} names {file!r}; allowed: .safetensors files beside it, without a path."
            )
        shards[file] = read_safetensors(inside(root, where + file))[0]
    for name, file in places.items():
        if name not in shards[file]:
            raise CheckpointError(f"{root / index} says that {name} is in {file}, which does not have it.")
    return {name: shards[file][name] for name, file in places.items()}
