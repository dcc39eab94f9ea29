"""What one picture takes of each network of a run, whatever its family."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from t2i import families
from t2i.config import RunConfig, check
from t2i.nn.blocks import blocks_of
from t2i.planned import PlannedNetwork
from t2i.planning.count import (
    Activations,
    Flops,
    activations,
    flops,
    peak_bytes_per_image,
)
from t2i.planning.drawing import Calls, counted_calls
from t2i.planning.memory import FP32, Trained

NONE = Activations(0, 0, 0)


@dataclass(frozen=True)
class Part:
    """One network, counted.

    flops: of one training picture; None where training does not run it
    activations: kept for the backward pass, where one goes through it
    peak_per_image: bytes while it runs, where no backward pass follows
    muon, averaged: of its parameters, those that Muon steps and those with a moving average
    inference: whether the weights that are drawn with have it
    gathered, in_blocks, largest_block, rows: of a trained network, as `t2i.planning.memory.Trained` has them
    turn, cached_as, saved, copied: as `t2i.planned.PlannedNetwork` has them
    drawing: what drawing one picture calls of it
    """

    name: str
    parameters: int
    trained: bool
    flops: Flops | None
    activations: Activations = NONE
    peak_per_image: int = 0
    muon: int = 0
    averaged: int = 0
    inference: bool = True
    gathered: int = 0
    in_blocks: int = 0
    largest_block: int = 0
    rows: tuple[tuple[int, int], ...] = ()
    turn: str = "train"
    cached_as: str | None = None
    saved: bool = False
    copied: bool = False
    drawing: Sequence[Calls] = ()


@dataclass(frozen=True)
class Model:
    """What is planned for.

    frozen_weight_bytes: of a number that a frozen network computes with: 2 beside bf16-mixed on a GPU, else 4
    """

    parts: tuple[Part, ...]
    frozen_weight_bytes: int = FP32

    def needed(self, cached: Collection[str] = ()) -> list[Part]:
        """Those that are there where the features `cached` are read instead of computed."""
        return [part for part in self.parts if part.cached_as not in cached]

    @property
    def cacheable(self) -> set[str]:
        """The features that can be read instead."""
        return {part.cached_as for part in self.parts if part.cached_as is not None}

    def trained(self, cached: Collection[str] = ()) -> Trained:
        """What a training step holds beside activations."""
        learning = [part for part in self.parts if part.trained]
        return Trained(
            parameters=sum(part.parameters for part in learning),
            muon=sum(part.muon for part in learning),
            averaged=sum(part.averaged for part in learning),
            frozen_bytes=self._frozen_bytes(cached),
            gathered=sum(part.gathered for part in learning),
            in_blocks=sum(part.in_blocks for part in learning),
            largest_block=max(part.largest_block for part in learning),
            rows=tuple(tensor for part in learning for tensor in part.rows),
            turns=len({part.turn for part in learning}),
        )

    def _frozen_bytes(self, cached: Collection[str]) -> int:
        """What is saved with the run is there in float32; where a copy of it computes, that too."""
        saved = FP32 * sum(part.parameters for part in self.parts if part.saved)
        copies = self.frozen_weight_bytes < FP32
        working = [
            part
            for part in self.needed(cached)
            if not part.trained and (not part.saved or (copies and part.copied))
        ]
        return saved + self.frozen_weight_bytes * sum(part.parameters for part in working)

    @property
    def activations(self) -> Activations:
        """Of all networks together: one backward pass goes through them all."""
        kept = zip(*(vars(part.activations).values() for part in self.parts), strict=True)
        return Activations(*map(sum, kept))

    def frozen_peak_per_image(self, cached: Collection[str] = ()) -> int:
        """Bytes while the largest of the frozen networks runs: they run one after another."""
        return max((part.peak_per_image for part in self.needed(cached)), default=0)


def sharded(network: PlannedNetwork, precision: str) -> dict[str, Any]:
    """What FSDP makes of it, by the names of `Part`: as t2i.training.strategy divides and gathers it."""
    blocks = [block for block in blocks_of(network.module) if type(block).forward is not nn.Module.forward]
    in_blocks = [gathered_bytes(block, precision) for block in blocks] if network.by_block else []
    return {
        "gathered": gathered_bytes(network.module, precision),
        "in_blocks": sum(in_blocks),
        "largest_block": max(in_blocks, default=0),
        "rows": tuple(
            (len(p), p.numel() // len(p)) if p.ndim else (1, 1) for p in network.module.parameters()
        ),
    }


def gathered_bytes(module: nn.Module, precision: str) -> int:
    """With bf16-mixed matrices in 16 bits and vectors in float32, else all in float32."""
    return sum(
        p.numel() * (2 if precision == "bf16-mixed" and p.ndim >= 2 else FP32)
        for p in module.parameters()
        if p.ndim
    )


def build_model(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]], device: str = "cuda") -> Model:
    """The model that `config` trains.

    builds_on: by key of the configuration's entry `builds_on`, the top-level mapping of the run that is meant
    device: whose kernels decide what is kept for the backward pass, "cuda" or "cpu"
    Raises ConfigError where the family is not planned for, or the size does not fit the model.
    """
    precision = planned_precision(config, device)
    check(precision != "64-true", "trainer.precision", precision, "32-true, bf16-mixed, 16-mixed, for a plan")
    return Model(
        parts=tuple(counted(network, config, device) for network in networks(config, builds_on)),
        frozen_weight_bytes=frozen_weight_bytes(precision, device),
    )


def frozen_weight_bytes(precision: str, device: str) -> int:
    """As `t2i.training.stage.BaseStage.frozen_dtype` has it."""
    return 2 if (precision, device) == ("bf16-mixed", "cuda") else FP32


def planned_precision(config: RunConfig, device: str) -> str:
    """Lightning's name; the GPUs of a plan have bf16."""
    automatic = "bf16-mixed" if device == "cuda" else "32-true"
    return automatic if config.trainer.precision == "auto" else config.trainer.precision


def networks(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> Iterable[PlannedNetwork]:
    """Those of the family's plan. Raises ConfigError where it has none."""
    family = families.get(config.family)
    check(family.plan is not None, "family", family.name, "a family with a plan")
    return family.load_plan()(config, builds_on)


def flops_per_image(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> int:
    """Of training, each once, without those of features that are read. builds_on, errors: as in `build_model`"""
    reads = all(part.encoded is not None for part in config.data.parts().values())
    counts = (
        flops_of(network)
        for network in networks(config, builds_on)
        if not (reads and network.cached_as is not None)
    )
    return sum(count.total for count in counts if count is not None)


def flops_of(network: PlannedNetwork) -> Flops | None:
    """Of one training picture; None where training does not run it."""
    calls = network.calls_per_image
    if not calls:
        return None
    with torch.device("meta"):
        once = flops(lambda: network.module(**network.inputs(1)), with_backward=has_gradients(network))
    return Flops(round(calls * once.forward), round(calls * once.backward))


def has_gradients(network: PlannedNetwork) -> bool:
    """Whether a backward pass goes through it."""
    with torch.device("meta"):
        return network.trained or any(x.requires_grad for x in network.inputs(1).values())


def counted(network: PlannedNetwork, config: RunConfig, device: str) -> Part:
    """What one picture takes of it. device: as in `build_model`"""
    module, calls, precision = network.module, network.calls_per_image, planned_precision(config, device)
    kept, peak = NONE, 0
    if calls and has_gradients(network):
        kept = activations(module, network.inputs, precision, device, config.trainer.compile)
    elif calls:
        peak = peak_bytes_per_image(module, network.inputs, precision, device)
    muon = network.hidden if config.optimizer.muon_scale is not None else []
    return Part(
        name=network.name,
        parameters=network.parameters,
        trained=network.trained,
        flops=flops_of(network),
        activations=Activations(
            kept.fixed, round(calls * kept.per_image), round(calls * kept.per_image_checkpointed)
        ),
        peak_per_image=peak,
        muon=sum(p.numel() for p in muon),
        averaged=network.parameters if network.trained and network.averaged and config.ema is not None else 0,
        inference=network.averaged,
        **(sharded(network, precision) if network.trained else {}),
        turn=network.turn,
        cached_as=network.cached_as,
        saved=network.saved,
        copied=network.copied,
        drawing=counted_calls(network),
    )
