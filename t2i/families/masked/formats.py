"""aMUSEd (2401.01808), as what `t2i convert` reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i.config import check, parse
from t2i.families.formats import NO_FOREIGN_FORM, Entries, Formats, Shapes, shapes_of
from t2i.families.masked.config import UVitConfig
from t2i.families.masked.uvit import UVit


def shapes(entries: Mapping[str, Any]) -> Shapes:
    """Of the transformer."""
    config = parse(UVitConfig, entries["transformer"], "transformer.")
    sizes = (entries["num_codes"], entries["context_dim"], entries["pooled_dim"])
    return shapes_of(lambda: UVit(config, *sizes, 1), "transformer")


def to_run(entries: Mapping[str, Any]) -> Entries:
    """Of a run that goes on from here: with the codec that these weights come with."""
    return {
        "stage": "masked",
        "family": "masked",
        "builds_on": {"codec": "latest"},
        "transformer": entries["transformer"],
        "text": entries["text"],
        "sampling": entries["sampling"],
        "label_smoothing": 0.1,
    }


def from_run(model: Mapping[str, Any]) -> Entries:
    wanted = {
        "transformer.name": (model["transformer"]["name"], "uvit"),
        "text.name": (model["text"]["name"], "clip_with_projection"),
    }
    for key, (value, allowed) in wanted.items():
        check(value == allowed, key, value, f"{allowed} {NO_FOREIGN_FORM}")
    return {key: model[key] for key in ("transformer", "text", "sampling")}


FORMATS = Formats(
    "masked_codes",
    {"codec": "model.codec.", "transformer": "model.transformer.", "text": "model.text."},
    shapes,
    to_run,
    from_run,
)
