"""Writing .safetensors files tensor by tensor: `safetensors.torch.save_file` wants all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2i.errors import CheckpointError
from t2i.interop.reading import SAFETENSORS_DTYPES
from t2i.interop.weights import FLOATS, Weight

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

Progress = Callable[[int], None]  # called with the bytes that were written since the last call


def saved_dtype(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    """Scalars keep the dtype they have, for there is nothing to save; so do whole numbers, and what has to be exact."""
    return dtype if weight.shape and weight.dtype in FLOATS and not weight.exact else weight.dtype


def saved_bytes(weights: Mapping[str, Weight], dtype: torch.dtype) -> int:
    """What `write_safetensors` will write, header aside."""
    return sum(weight.nbytes(saved_dtype(weight, dtype)) for weight in weights.values())


def write_safetensors(
    path: Path,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """Eight bytes with the length of the header, the header in JSON, then the numbers. The bytes are those that
    `safetensors.torch.save_file` writes: wide dtypes first, so that all are aligned, then by name.

    dtype: what floating tensors are written as. Raises CheckpointError where one has numbers too large for it.
    """
    order = sorted(weights, key=lambda name: (-saved_dtype(weights[name], dtype).itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        kept = saved_dtype(weights[name], dtype)
        start, end = end, end + weights[name].nbytes(kept)
        header[name] = {
            "dtype": NAMES[kept],
            "shape": list(weights[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = cast(weights[name].read(), saved_dtype(weights[name], dtype), name)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            progress(tensor.nbytes)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype, contiguous; no number may become infinite."""
    changed = tensor.to(dtype).contiguous()
    if changed.dtype != tensor.dtype and not changed.isfinite().all():
        largest = tensor.abs().max().item()
        fitting = [each for each, kind in DTYPES.items() if largest <= torch.finfo(kind).max]
        raise CheckpointError(
            f"{name} has numbers up to {largest:.3g}, too large for {str(dtype).removeprefix('torch.')}; "
            + (f"allowed: --dtype {' or '.join(fitting)}." if fitting else "no --dtype holds them.")
        )
    return changed
