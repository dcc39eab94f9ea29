"""Weights in files, described without being read, so that a conversion holds one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from t2i.errors import CheckpointError
from t2i.weight_file import check_finite

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Weight:
    """A tensor that is still in its file: `read` gets it, on the CPU.

    exact: written in its own dtype, whatever that of the file
    `read` raises CheckpointError where the file was cut short, or where a number is NaN or infinite.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    exact: bool = False

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes in `dtype`, by default its own."""
        return math.prod(self.shape) * (dtype or self.dtype).itemsize

    def reshaped(self, *shape: int) -> Weight:
        """The same numbers in another shape."""
        return Weight(shape, self.dtype, lambda: self.read().reshape(shape))

    def rows(self, start: int, stop: int) -> Weight:
        """Rows start to stop - 1 of the first axis."""
        return Weight((stop - start, *self.shape[1:]), self.dtype, lambda: self.read()[start:stop])


Weights = dict[str, Weight]


def in_memory(tensor: Tensor, exact: bool = False) -> Weight:
    """A tensor that is already there."""
    return Weight(tuple(tensor.shape), tensor.dtype, lambda: tensor, exact)


def stacked(weights: Sequence[Weight]) -> Weight:
    """One below the other along the first axis; the further axes and the dtype are the first one's."""
    first = weights[0]
    rows = sum(weight.shape[0] for weight in weights)
    return Weight((rows, *first.shape[1:]), first.dtype, lambda: torch.cat([w.read() for w in weights]))


def checked(name: str, path: Path, weight: Weight) -> Weight:
    """The same, which as a part of the file `path` has to be finite wherever it goes."""

    def read() -> Tensor:
        tensor = weight.read()
        check_finite({name: tensor}, path)
        return tensor

    return Weight(weight.shape, weight.dtype, read)


def stored(
    path: Path, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
) -> Weight:
    """What lies in a file from byte `offset` on; stride (in elements) where that is not row by row.

    A plain read and no memory map: mapped pages would count as this process's memory until the file is closed.
    """
    shape = tuple(shape)
    numbers = math.prod(shape)
    if stride is not None and numbers:
        numbers = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))

    def read() -> Tensor:
        if not numbers:
            return torch.empty(shape, dtype=dtype)
        data = bytearray(numbers * dtype.itemsize)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                num_read = file.readinto(data)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if num_read != len(data):
            raise CheckpointError(f"{path} is cut short: it ends within a weight.")
        flat = torch.frombuffer(data, dtype=dtype)
        return flat.view(shape) if stride is None else flat.as_strided(shape, tuple(stride)).contiguous()

    return Weight(shape, dtype, read)


def fit(
    found: Mapping[str, Weight], wanted: Mapping[str, tuple[int, ...]], source: Path, part: str
) -> dict[str, Weight]:
    """The weights that `wanted` names, in its order. All of them must be there in the right shape, in floating
    point, and there must be no others: CheckpointError names the first that do not fit. Nothing is read."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit the {part} that it describes: {_listed(missing)} missing, "
            f"{_listed(unknown)} unknown."
        )
    for name, shape in wanted.items():
        weight = found[name]
        if weight.shape != tuple(shape):
            raise CheckpointError(
                f"{source} does not fit the {part} that it describes: {name} has shape {weight.shape}; "
                f"allowed: {tuple(shape)}."
            )
        check_floating(name, weight, source)
    return {name: found[name] for name in wanted}


def check_floating(name: str, weight: Weight, source: Path) -> None:
    """Raises CheckpointError for one that is stored as whole numbers or truth values."""
    if weight.dtype not in FLOATS:
        raise CheckpointError(
            f"{name} in {source} is stored as {_plain(weight.dtype)}; allowed: {', '.join(map(_plain, FLOATS))}."
        )


def under(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """Those whose names begin with `prefix`, which is taken off."""
    return {name[len(prefix) :]: weight for name, weight in weights.items() if name.startswith(prefix)}


def renamed(weights: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    """With `prefix` before each name."""
    return {prefix + name: weight for name, weight in weights.items()}


def _listed(names: Sequence[str]) -> str:
    """ "2 weights [a, b] are" """
    if not names:
        return "no weight is"
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} [{first}] {'are' if len(names) > 1 else 'is'}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
