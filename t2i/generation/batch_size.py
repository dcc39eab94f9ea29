"""How many pictures are drawn at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from t2i.interfaces import SampleRequest

ON_CPU = 16  # pictures at a time, where nothing else is said
FIRST_ON_GPU, MOST_ON_GPU = 4, 64
USED_SHARE = 0.85  # of the memory that is free
log = logging.getLogger(__name__)


class BatchSize:
    """given: pictures at a time; None finds it: ON_CPU on a CPU; on a GPU FIRST_ON_GPU, and then as many, up to
    MOST_ON_GPU, as the memory that those took lets expect to fit. Where memory does not do, half as many, in each case.
    """

    def __init__(self, given: int | None, device: torch.device) -> None:
        self._device, self._given = device, given
        self._measures = given is None and device.type == "cuda"
        self._now: dict[tuple[int, int], int] = {}  # by height and width

    def block(self, pictures: int, processes: int) -> int:
        """Into how many of so many pictures they are cut for the processes to share them."""
        if self._given is not None:
            return self._given
        most = MOST_ON_GPU if self._measures else ON_CPU
        return max(1, min(most, -(-pictures // processes)))

    def parts(
        self, request: SampleRequest, generate: Callable[[SampleRequest], Tensor]
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The request drawn in parts: which of its pictures, and those (n, 3, H, W)."""
        start, count = 0, len(request.prompts)
        size_px = request.height_px, request.width_px
        while start < count:
            most = self._now.setdefault(size_px, self._first())
            places = range(start, min(count, start + most))
            before = self._memory_used()
            try:
                images = generate(request.rows(places))
            except RuntimeError as error:
                if not _is_memory(error) or len(places) == 1:
                    raise
                self._now[size_px] = len(places) // 2
                self._measures = False
            else:
                if self._measures:
                    self._now[size_px] = self._fitting(len(places), before)
                yield places, images
                start = places.stop
                continue
            # Outside of the handler, whose traceback keeps what was computed alive.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            log.info(
                "Memory does not do for %d pictures at a time: %d from now on",
                len(places),
                self._now[size_px],
            )

    def _first(self) -> int:
        if self._given is not None:
            return self._given
        return FIRST_ON_GPU if self._measures else ON_CPU

    def _memory_used(self) -> int:
        if not self._measures:
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _fitting(self, drawn: int, before: int) -> int:
        """After so many were drawn at a time, with so many bytes taken before."""
        each = max(1, (torch.cuda.max_memory_allocated(self._device) - before) // drawn)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return fitting(each, torch.cuda.mem_get_info(self._device)[0] + kept)


def fitting(bytes_each: int, bytes_free: int) -> int:
    """The largest power of two of pictures that take so many bytes each, from 1 to MOST_ON_GPU."""
    count = int(USED_SHARE * bytes_free) // bytes_each
    return min(MOST_ON_GPU, 1 << max(0, count.bit_length() - 1))


def _is_memory(error: RuntimeError) -> bool:
    said = ("can't allocate memory", "STATUS_ALLOC_FAILED")  # by a CPU's allocator; by cuBLAS and cuDNN
    return isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in said)
