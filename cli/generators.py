"""The trained model that a verb draws with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.config import Precision, TextConfig, parse_run
from t2i.errors import UserError
from t2i.launch.ranks import Rank
from t2i.schema import check

from . import hub
from .newest import newest_that_draws

if TYPE_CHECKING:
    import torch

    from t2i.interfaces import Generator


CODEC = re.compile(r"\+*builds_on(\.codec)?=")
DOWNLOAD = re.compile(r"\+*text\.allow_download=")


@dataclass(frozen=True)
class Loaded:
    """path: of the weights; weights: what tells them, with the changes to their configuration, from all others
    usual: the family's own options that it draws with where nothing else is asked; the generator's are those of what
        was drawn last
    text: its text encoder; config: the run's, changed; sizes: numbers in each of the weights, by name"""

    path: Path
    generator: Generator
    weights: str
    usual: Any
    text: TextConfig | None
    config: dict[str, Any]
    sizes: Mapping[str, int]

    def sampling(self, changes: Mapping[str, Any]) -> Any:
        """The family's own options with changes. Raises ConfigError for what there is not."""
        from t2i import families
        from t2i.schema import to_dict

        if not changes:
            return self.usual
        values = {**self.config, "sampling": {**to_dict(self.usual), **changes}}
        return vars(parse_run(values, families.get(self.config["family"]).load_config()).model)["sampling"]


def device_named(name: str | None, rank: Rank) -> torch.device:
    """The device of that name, cpu or cuda, for this process. Raises ConfigError for one that is not there."""
    import torch

    from t2i.launch.processes import own_device

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    check(name in (None, *devices), "--device", name, " or ".join(devices))
    return torch.device("cpu") if name == "cpu" else own_device(rank)


def load(
    path: Path, device: torch.device, overrides: Sequence[str], precision: Precision | None = None
) -> Loaded:
    """What a file of weights draws with. Raises UserError for one that draws nothing.

    overrides: key=value for its configuration, of which builds_on.codec=RUN has the codec of that run decode
    precision: in place of its run's
    """
    from t2i import families
    from t2i.families.codec_run import with_codec
    from t2i.generation.recipes import weights_digest
    from t2i.training import checkpoint as checkpoints

    found = checkpoints.load(path)
    check_draws(path, found.config)
    low = _low_run(found.config)
    found.config = with_overrides(found.config, list(overrides))
    if precision is not None:
        found.config = {**found.config, "trainer": {**found.config["trainer"], "precision": precision}}
    family = found.config.get("family")
    record = families.get(family)
    text = parse_run(found.config, record.load_config()).model.text_encoder()
    asked = _low_run(found.config)
    check(asked == low, "builds_on.low", asked, f"{low}, the run whose weights {path} holds")
    if any(CODEC.match(each) for each in overrides):
        found = with_codec(found, str(found.config["builds_on"]["codec"]))
    # What the checkpoint itself says of downloads is the word of who trained it.
    if text is not None and text.allow_download and any(DOWNLOAD.match(each) for each in overrides):
        hub.allow()
    generator = record.load_generator()(found, device)
    kept = ("sampling.", *(each for each in overrides if CODEC.match(each) or DOWNLOAD.match(each)))
    changes = [each for each in overrides if not each.startswith(kept)]
    digest = weights_digest(found.weights, changes)
    sizes = {name: value.numel() for name, value in found.weights.items()}
    return Loaded(path, generator, digest, generator.sampling, text, found.config, sizes)


def _low_run(config: Mapping[str, Any]) -> Any:
    builds_on = config.get("builds_on")
    return builds_on.get("low") if isinstance(builds_on, Mapping) else None


def check_draws(place: str | Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for a run with this configuration whose family draws nothing for prompts."""
    from t2i import families

    family = config.get("family")
    if families.get(family).generator is None:
        drawing = ", ".join(families.stages_with("generator"))
        raise UserError(
            f"{place} is of the family {family}, which draws nothing for prompts; allowed: a run of stage {drawing}."
        )


def weights_path(checkpoint: str | None, runs_dir: str) -> Path:
    """The weights to draw with."""
    from t2i.training import run_folder

    return run_folder.weights_file(checkpoint if checkpoint is not None else newest_that_draws(runs_dir))


def with_overrides(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The checkpoint's configuration with key=value changes, such as text.model=/a/local/directory."""
    if not overrides:
        return config
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from .composition import explained, quoted

    changed = OmegaConf.create(config)
    with explained():
        for parsed in OverridesParser.create().parse_overrides([quoted(each) for each in overrides]):
            OmegaConf.update(changed, parsed.key_or_group, parsed.value(), force_add=True)
    return OmegaConf.to_container(changed)  # type: ignore[return-value]
