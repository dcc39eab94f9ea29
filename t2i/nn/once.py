"""What is the same at each step of a walk, such as the keys and values of the text, computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Kept = dict[Callable[..., Any], tuple[tuple[Tensor, ...], Any]]
"""By what computed it: what it was given last, and what it made of that."""

_last: ContextVar[Kept | None] = ContextVar("_last", default=None)


@contextmanager
def weights_unchanged() -> Iterator[Kept]:
    """A walk, also as a decorator: within it no weight may change, nor a tensor in place that `once` was given. Gives
    what is kept."""
    kept: Kept = {}
    token = _last.set(kept)
    try:
        yield kept
    finally:
        _last.reset(token)


def once(compute: Callable[..., T], *given: Tensor) -> T:
    """compute(*given), within a walk that of the last call where it was given the very same tensors.

    compute: a module, or a method of one. With gradients it is computed each time, and in compiled blocks, which would
        be compiled for each text.
    """
    last = None if torch.compiler.is_compiling() or torch.is_grad_enabled() else _last.get()
    if last is None:
        return compute(*given)
    if compute not in last or any(a is not b for a, b in zip(last[compute][0], given, strict=True)):
        last[compute] = given, compute(*given)
    return last[compute][1]
