"""What a family's plan says: the networks of a run, and what drawing calls of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class PlannedCalls:
    """Calls of a network while one picture is drawn. What they compute and read grows evenly from first to last.

    count: how many
    first, last: run these, on the current default device, for one picture (and its unconditional half, under guidance)
    cached: how many numbers of keys and values, kept from earlier calls and added by this one, the first and the last
        attend to, beside what `t2i.nn.once` keeps
    after: the call before them in the same walk: what `t2i.nn.once` keeps of it is there; None: nothing is
    """

    count: int
    first: Callable[[], Tensor]
    last: Callable[[], Tensor]
    cached: tuple[int, int] = (0, 0)
    after: Callable[[], Tensor] | None = None


def alike(count: int, run: Callable[[], Tensor]) -> list[PlannedCalls]:
    """So many calls of one walk, all of the very same tensors: those after the first find what `t2i.nn.once` keeps."""
    following = [PlannedCalls(count - 1, run, run, after=run)] if count > 1 else []
    return [PlannedCalls(1, run, run), *following]


@dataclass(frozen=True)
class PlannedNetwork:
    """One network of a run as its family's `plan` gives it: what parameters, FLOPs and memory are counted from.

    module: on the meta device; its forward gives one tensor
    inputs: batch size -> keyword arguments of module.forward, made on the current default device. Where one of them
        requires a gradient, the backward pass goes through this network
    trained: its own parameters learn
    calls_per_image: forward passes, each with its backward pass, per training picture; 0 where training does not run it
    hidden: of its parameters, those that Muon may step
    averaged: of a trained network, whether the EMA and model.safetensors have it
    cached_as: of a frozen network, which of the stage's `features` stands in for it; such a network is drawn with
    saved: of a frozen network, whether the run's files have it
    copied: of one that is saved, whether a copy in 16 bits works in its place where frozen networks are in bfloat16
    num_parameters: where the module holds more than this network
    by_block: of a trained network, whether FSDP gathers it block by block (`BaseStage.blocks_to_gather`)
    turn: of a trained network, the step's turn that trains it
    """

    name: str
    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    trained: bool
    calls_per_image: float = 1.0
    hidden: Sequence[nn.Parameter] = ()
    averaged: bool = True
    cached_as: str | None = None
    saved: bool = False
    copied: bool = False
    num_parameters: int | None = None
    by_block: bool = True
    turn: str = "train"
    drawing: Sequence[PlannedCalls] = ()  # what drawing one picture calls of it, where the family says

    @property
    def parameters(self) -> int:
        """How many there are."""
        counted = sum(p.numel() for p in self.module.parameters())
        return counted if self.num_parameters is None else self.num_parameters
