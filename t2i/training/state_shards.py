"""Checkpoints that several processes write: of what FSDP divides among them, each writes the rows that it holds, as
shard_00000.safetensors and so on. A divided tensor is those of all shards, one below the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from t2i.errors import CheckpointError
from t2i.files import system_error
from t2i.training.divided import own

T = TypeVar("T")
SHARD = re.compile(r"shard_\d{5,}\.safetensors")
NOTE = "in the shards"  # {NOTE: name} stands in the place of a divided tensor


def file_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]] | None]:
    """What one process writes for all, with a note in the place of each divided tensor; and the rows that this process
    writes, by the name of their file. None where nothing is divided, and no file where another process holds the same
    rows."""
    rows, meshes = dict[str, Tensor](), set[Any]()

    def taken(path: Any, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        name = "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        rows[name] = own(value)
        meshes.add(value.device_mesh)
        return {NOTE: name}

    rest = pytree.tree_map_with_path(taken, dict(checkpoint))
    if not meshes:
        return rest, None
    (mesh,) = meshes
    *replica, number = mesh.get_coordinate()
    return rest, {} if any(replica) else {file_name(number): rows}


class Shards:
    """Those of a checkpoint's folder, in order. Tensors are read when they are asked for. Raises CheckpointError."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        try:
            self.files = [safe_open(path, framework="pt") for path in paths]
            self.names = sorted(self.files[0].keys()) if paths else []
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{paths[0].parent} has shards that cannot be read: {error}.") from error

    def whole(self, name: str) -> Tensor:
        """A divided tensor."""
        try:
            return torch.cat([file.get_tensor(name) for file in self.files])
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.paths[0].parent} has shards that do not fit: {error}.") from error

    def under(self, key: str) -> dict[str, Tensor]:
        """The divided ones of an entry of the checkpoint ("state_dict"), by their names in it."""
        prefix = f"{key}/"
        return {name.removeprefix(prefix): self.whole(name) for name in self.names if name.startswith(prefix)}

    def joined(self, values: Any) -> Any:
        """The same with tensors in the place of notes."""
        return pytree.tree_map(
            lambda value: self.whole(value[NOTE]) if is_note(value) else value, values, is_leaf=is_note
        )


def is_note(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {NOTE}


def agreed(step: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Takes the step in each process of the group, and gives what it returned in each. Raises in all where it raises in
    one; OSError where that does."""
    result, failed = None, None
    try:
        result = step()
    except Exception as error:
        failed = error
    told = None if failed is None else (getattr(system_error(failed), "errno", None), repr(failed))
    answers: list[Any] = [(result, told)]
    if group is not None:
        answers *= dist.get_world_size(group)
        dist.all_gather_object(answers, (result, told), group=group)
    if failed is not None:
        raise failed
    for number, said in (told for _, told in answers if told is not None):
        raise OSError(number, said) if number is not None else RuntimeError(said)
    return [result for result, _ in answers]
