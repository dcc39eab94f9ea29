"""What the rest of the program knows of a family of models: one record, which the family's folder declares."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from t2i.schema import check

if TYPE_CHECKING:
    import torch

    from t2i.config import ModelConfig, RunConfig
    from t2i.families.formats import Formats
    from t2i.interfaces import Generator, ImageCodec
    from t2i.planned import PlannedNetwork
    from t2i.training.checkpoint import LoadedCheckpoint
    from t2i.training.stage import BaseStage


@dataclass(frozen=True)
class Family:
    """Parts are named "module:name", the module within the family's own folder, and imported when they are asked for:
    listing families imports no torch. What a family does not have is None.

    package: of the folder: `__name__`
    config: its dataclass, a `t2i.config.ModelConfig`; imports no torch
    stages: the stages that it trains, each a `t2i.training.stage.BaseStage`
    generator: (checkpoint, device) -> a `t2i.interfaces.Generator`: prompts to pictures
    codec: (the top-level mapping of a run's configuration) -> an `nn.Module` that is a `t2i.interfaces.ImageCodec`,
        randomly initialised. Its weights begin with "codec." in the run's files
    token_codec: the same, where its runs can have a `t2i.interfaces.TokenCodec`
    plan: (the run's configuration, builds_on) -> its networks on the meta device, as `t2i plan` counts them. The second
        argument has by key of `builds_on` the top-level mapping of the configuration of the run that is meant there,
        and where the run builds on one at a lower resolution "low": {"config": that one's, "extra": what it builds on,
        by key}. Raises ConfigError for a size that the model does not take
    builds_on: by key of the entry `builds_on` in its configuration, which part another family's run has to have there:
        {"codec": "codec"} or {"codec": "token_codec"}
    low: the stages of this family that its entry `builds_on.low` may name a run of, at a lower resolution; () where its
        configuration has no such entry
    formats: a `t2i.families.formats.Formats`: what `t2i convert` needs to know, where its models have foreign forms
    """

    package: str
    config: str
    stages: Mapping[str, str]
    generator: str | None = None
    codec: str | None = None
    token_codec: str | None = None
    plan: str | None = None
    builds_on: Mapping[str, str] = field(default_factory=dict)
    low: Sequence[str] = ()
    formats: str | None = None

    @property
    def name(self) -> str:
        """The folder's."""
        return self.package.rpartition(".")[2]

    def load_config(self) -> type[ModelConfig]:
        return self._part(self.config)

    def load_stage(self, stage: str) -> type[BaseStage]:
        """Raises ConfigError for a stage that this family does not train."""
        check(stage in self.stages, "stage", stage, f"{', '.join(self.stages)}, with family={self.name}")
        return self._part(self.stages[stage])

    def load_generator(self) -> Callable[[LoadedCheckpoint, torch.device | str | None], Generator]:
        return self._part(self.generator)

    def load_codec(self) -> Callable[[Mapping[str, Any]], ImageCodec]:
        return self._part(self.codec)

    def load_plan(self) -> Callable[[RunConfig, Mapping[str, Mapping[str, Any]]], list[PlannedNetwork]]:
        return self._part(self.plan)

    def load_formats(self) -> Formats:
        return self._part(self.formats)

    def _part(self, reference: str | None) -> Any:
        assert reference is not None, f"{self.name} has no such part"
        module, _, name = reference.partition(":")
        return getattr(importlib.import_module(f"{self.package}.{module}"), name)
