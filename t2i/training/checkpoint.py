"""Reading weights safely, and writing the final ones as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from t2i.errors import CheckpointError
from t2i.few import plural
from t2i.files import written_whole
from t2i.training import state_folder
from t2i.training.finite import check_before_writing
from t2i.weight_file import check_finite, is_zip, unpickled, weights_format

# At the start of a value in a weights file's configuration: the folder that the file lies in. A run folder that
# brings its text encoder along can so be moved.
RUN_FOLDER = "{run}"


@dataclass
class LoadedCheckpoint:
    """weights: trained and frozen weights by name, the averaged ones in place of the raw where there are any
    config: the run's resolved configuration
    extra: what the stage added (see BaseStage.checkpoint_extra)
    """

    path: Path
    weights: dict[str, Tensor]
    config: dict[str, Any]
    extra: dict[str, Any]


def load(path: Path, use_ema: bool = True) -> LoadedCheckpoint:
    """Reads a checkpoint's folder, or a pickle or a safetensors file that t2i wrote, whatever its name. Nothing in
    them can run code: pickles are read with weights_only=True. Raises CheckpointError where one is foreign, unsafe or
    cut short."""
    if path.is_dir():
        return _checked(path, state_folder.weights(path, use_ema), state_folder.header(path))
    if weights_format(path) == "safetensors":
        return _load_safetensors(path)
    if not is_zip(path):
        raise CheckpointError(
            f"{path} was not written by t2i: it is neither safetensors nor a file of torch.save."
        )
    saved = unpickled(path, mmap=True)
    if not isinstance(saved, dict):
        saved = {}
    averaged = saved.get("ema", {}) if use_ema else {}
    return _checked(path, (saved.get("state_dict"), averaged), saved.get("t2i"))


def save_final(weights: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> None:
    """The weights for use. header: config, extra and images_seen of the run. Raises TrainingError where the weights are
    not finite."""
    contiguous = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    check_before_writing(contiguous.items(), path)
    with written_whole(path) as unfinished:
        save_file(contiguous, unfinished, metadata={"t2i": json.dumps(header)})


def images_seen(path: Path) -> int | None:
    """How many images the final weights in `path` were trained on; None where there are none, or they do not say."""
    found = number_in_header(path, "images_seen")
    return found if isinstance(found, int) else None


def number_in_header(path: Path, key: str) -> float | None:
    """What the weights in `path` say of themselves; None where there are none, or they do not say."""
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("t2i", "{}")).get(key)
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, int | float) else None


def load_into(module: nn.Module, weights: Mapping[str, Tensor], source: Path, prefix: str = "") -> None:
    """Copies the weights whose names begin with `prefix` (which is taken off) into `module`. All names and
    shapes must fit, and all numbers be finite; the error names the first that do not."""
    chosen = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - chosen.keys()), sorted(chosen.keys() - own.keys())
    if missing or unknown:
        counts = ((len(missing), "missing", missing), (len(unknown), "unknown", unknown))
        said = [
            f"{plural(n, 'weight is', 'weights are')} {kind} ({', '.join(names[:3])})"
            for n, kind, names in counts
            if n
        ]
        raise CheckpointError(f"{source} does not fit the model: {', '.join(said)}.")
    for name, value in chosen.items():
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"{source} does not fit the model: {name} has shape {tuple(value.shape)}, "
                f"the model wants {tuple(own[name].shape)}."
            )
    check_finite(chosen, source)
    module.load_state_dict(chosen)


def _load_safetensors(path: Path) -> LoadedCheckpoint:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("t2i", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error
    return _checked(path, (weights, {}), header)


def _checked(path: Path, weights: tuple[Any, Any], header: Any) -> LoadedCheckpoint:
    """What `load` gives, made of the raw and the averaged weights and of the entry 't2i', if all are that."""
    parts = [header.get(key) for key in ("config", "extra")] if isinstance(header, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path} was not written by t2i: it has no entry 't2i' with config and extra.")
    if not all(isinstance(part, dict) for part in weights):
        raise CheckpointError(f"{path} was not written by t2i: it holds no weights.")
    config = placed(header["config"], path.parent)
    return LoadedCheckpoint(path, {**weights[0], **weights[1]}, config, header["extra"])


def placed(value: Any, folder: Path) -> Any:
    """`value` with RUN_FOLDER at the start of its texts, at any depth, replaced by `folder`."""
    if isinstance(value, dict):
        return {key: placed(entry, folder) for key, entry in value.items()}
    if isinstance(value, str) and value.startswith(f"{RUN_FOLDER}/"):
        return str(folder / value.removeprefix(f"{RUN_FOLDER}/"))
    return value
