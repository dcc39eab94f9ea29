"""Opening foreign files of weights. They are hostile until read: no code in them runs, and what they say of
sizes is checked against the file before anything of that size is allocated."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import safe_globals

from t2i.errors import CheckpointError
from t2i.interop.weights import Weight, Weights, checked, in_memory, stored
from t2i.weight_file import named_by_content, reason_of, weights_format

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class LightningCallback:
    """Stands for a class that it does not import.

    Checkpoints of Lightning before 1.5, sd-v1-4.ckpt among them, use the class of a callback as the key under
    "callbacks" that its state is kept at. `weights_only` rightly refuses to import a class that a file names.
    Here the name leads to this empty class: the file can be read, and nothing of Lightning is loaded or called.
    """


CALLBACKS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (LightningCallback, f"{package}.callbacks.{name}")
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in (
        "model_checkpoint.ModelCheckpoint",
        "early_stopping.EarlyStopping",
        "lr_monitor.LearningRateMonitor",
    )
]


def read_safetensors(path: Path) -> tuple[Weights, dict[str, str]]:
    """The weights of a .safetensors file by name, unread, and the text in its header."""
    try:
        with safe_open(path, framework="pt") as file:  # checks the header against the file's length
            metadata = file.metadata() or {}
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, json.JSONDecodeError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {reason_of(error)}.") from error
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"{name} in {path} is stored as {entry['dtype']}; allowed: {', '.join(SAFETENSORS_DTYPES)}."
            )
        start = 8 + length + entry["data_offsets"][0]
        weight = stored(path, start, SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"])
        weights[name] = checked(name, path, weight)
    return weights, metadata


def read_pickle(path: Path) -> dict[str, Any]:
    """What a .ckpt, .bin or .pt file holds, its tensors as unread `Weight`s. Raises CheckpointError where
    reading it would mean to run code that it brings."""
    try:
        # Under FakeTensorMode torch.load reads the pickle but not the numbers, and notes where they are.
        with (
            named_by_content(path) as named,
            safe_globals(CALLBACKS),
            FakeTensorMode(),
            warnings.catch_warnings(action="ignore"),
        ):
            saved = torch.load(named, map_location="cpu", weights_only=True)
        if any(_offset(tensor) is None for tensor in _tensors(saved)):  # torch's format of before 2020
            with named_by_content(path) as named, safe_globals(CALLBACKS):
                saved = torch.load(named, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        words = str(error).replace("`", " ").split()
        if "GLOBAL" not in words[:-1]:
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint: its pickle is not one that torch.save wrote, or is damaged."
            ) from error
        code = words[words.index("GLOBAL") + 1]
        remedy = "Ask its author for a .safetensors file."
        if code.startswith("dall_e."):
            remedy = (
                f"Where you trust it and the package dall_e is, torch.save(dall_e.load_model({str(path)!r}, "
                f"'cpu').state_dict(), {str(path.with_suffix('.pt'))!r}) makes a file of weights alone."
            )
        raise CheckpointError(
            f"{path} cannot be read without running code that it names ({code}); refused. {remedy}"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes lead the unpickler astray in every way there is
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason_of(error)}.") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} holds a {type(saved).__name__}; allowed: a dictionary of weights.")
    return _described(saved, path)


def read_weights(path: Path) -> Weights:
    """The weights of a safetensors file, or of a pickle that is one dictionary of tensors, whatever its name."""
    if weights_format(path) == "safetensors":
        return read_safetensors(path)[0]
    return only_weights(read_pickle(path))


def read_named(path: Path) -> tuple[Weights, dict[str, str], bool]:
    """The weights of a file that holds a model, the text in its header, and whether t2i wrote it."""
    if weights_format(path) == "safetensors":
        weights, metadata = read_safetensors(path)
        return weights, metadata, "t2i" in metadata
    saved = read_pickle(path)
    inner = saved.get("state_dict")
    return only_weights(inner if isinstance(inner, dict) else saved), {}, "t2i" in saved


def only_weights(mapping: dict[str, Any]) -> Weights:
    """The entries that are tensors."""
    return {name: value for name, value in mapping.items() if isinstance(value, Weight)}


def _described(value: Any, path: Path, name: str = "") -> Any:
    if isinstance(value, Tensor):
        return checked(name, path, _weight(value, path))
    if isinstance(value, dict):
        return {str(key): _described(entry, path, str(key)) for key, entry in value.items()}
    return value


def _weight(tensor: Tensor, path: Path) -> Weight:
    offset = _offset(tensor)
    if offset is None:
        return in_memory(tensor.detach())
    storage = tensor.untyped_storage()
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    last = (tensor.storage_offset() + extent) * tensor.dtype.itemsize
    if tensor.numel() and (last > storage.nbytes() or offset + last > path.stat().st_size):
        raise CheckpointError(f"{path} is cut short or damaged: it is smaller than the weights it names.")
    start = offset + int(tensor.storage_offset()) * tensor.dtype.itemsize
    return stored(path, start, tensor.dtype, tensor.shape, tensor.stride())


def _offset(tensor: Tensor) -> int | None:
    """Where the tensor's storage begins in the file, if it is still there."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for entry in value.values() for t in _tensors(entry)] if isinstance(value, dict) else []
