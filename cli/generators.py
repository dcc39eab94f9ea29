"""The trained model that a verb draws with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.config import TextConfig, parse_run
from t2i.errors import UserError
from t2i.schema import check

from . import hub
from .newest import newest_that_draws

if TYPE_CHECKING:
    from t2i.interfaces import Generator


def load_generator(
    checkpoint: str | None, runs_dir: str, device: str | None, overrides: list[str]
) -> tuple[Path, Generator, TextConfig | None]:
    """(its weights, the generator, its text encoder). checkpoint: a run or a file of weights; None takes the newest run
    that draws. Raises ConfigError for a device that is not there, UserError for a run that draws nothing."""
    import torch

    from t2i import families
    from t2i.training import checkpoint as checkpoints

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    check(device in (None, *devices), "--device", device, " or ".join(devices))
    path = weights_path(checkpoint, runs_dir)
    loaded = checkpoints.load(path)
    loaded.config = with_overrides(loaded.config, overrides)
    family = loaded.config.get("family")
    record = families.get(family)
    text = parse_run(loaded.config, record.load_config()).model.text_encoder()
    if text is not None and text.allow_download:
        hub.allow()
    if record.generator is None:
        drawing = ", ".join(families.stages_with("generator"))
        raise UserError(
            f"{path} is of the family {family}, which draws nothing for prompts; allowed: a run of stage {drawing}."
        )
    return path, record.load_generator()(loaded, device), text


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
