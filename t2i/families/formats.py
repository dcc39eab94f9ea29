"""What `t2i convert` needs to know of a family whose models have foreign forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from t2i.errors import ConfigError
from t2i.weight_file import reason_of

# Of a network: a stranger's file may claim any depth, and a module takes time and memory.
MOST_WEIGHTS = 2**15
Entries = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Formats:
    """A model comes down to parts: a codec and, of a text-to-image model, a denoiser or a transformer of codes, and a
    text encoder. The model's entries say what they are: plain mappings with keys of config.yaml.

    kind: "codec" is an image codec by itself, with the entries codec and backbone; "text_to_image" a UNet that denoises
        a codec's latents, with the entries denoiser, schedule, prediction, text and sampling; "masked_codes" a
        transformer that draws a codec's codes, with the entries transformer, text and sampling
    prefixes: by part ("codec", "denoiser", "transformer", "text"), what the names of its weights begin with in a run's
        files
    shapes: (the entries of a codec, the entry denoiser with the channels and the width of the text that it is built
        for, or the entry transformer beside num_codes, context_dim and pooled_dim) -> the network's weights by name;
        nothing is allocated. Raises ConfigError
    to_run: the model's entries -> the top-level keys of a run that are not every stage's, with stage and family
    from_run: the configuration of a run's model -> the model's entries. Raises ConfigError where they have no foreign
        form
    """

    kind: Literal["codec", "text_to_image", "masked_codes"]
    prefixes: Mapping[str, str]
    shapes: Callable[[Mapping[str, Any]], Shapes]
    to_run: Callable[[Mapping[str, Any]], Entries]
    from_run: Callable[[Mapping[str, Any]], Entries]


def shapes_of(build: Callable[[], nn.Module], key: str) -> Shapes:
    """Of the module's state dict; nothing of its sizes is allocated. Raises ConfigError, which names `key`, where it
    would have more than MOST_WEIGHTS weights, or numbers than can be counted."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > MOST_WEIGHTS:
            raise ConfigError(
                f"{key} describes a network of more than {MOST_WEIGHTS:,} weights; allowed: fewer."
            )

    hook = register_module_parameter_registration_hook(counted)
    try:
        with torch.device("meta"):
            module = build()
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond what torch counts
        raise ConfigError(
            f"{key} describes a network of sizes that cannot be: {reason_of(error)}."
        ) from error
    finally:
        hook.remove()
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


NO_FOREIGN_FORM = "(other kinds have no foreign form)"
