"""What `t2i convert` needs to know of a family whose models have foreign forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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


NO_FOREIGN_FORM = "(other kinds have no foreign form)"
