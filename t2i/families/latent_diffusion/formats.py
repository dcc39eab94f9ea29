"""Stable Diffusion 1 and 2 and LDM text-to-image, as what `t2i convert` reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i.config import check, parse
from t2i.families.formats import NO_FOREIGN_FORM, Entries, Formats, Shapes, shapes_of
from t2i.families.latent_diffusion.config import UNetDenoiserConfig
from t2i.families.latent_diffusion.model import build_denoiser


def shapes(denoiser: Mapping[str, Any]) -> Shapes:
    """Of the UNet."""
    config = parse(UNetDenoiserConfig, denoiser, "denoiser.")
    sizes = (config.out_channels, config.context_dim, config.context_dim)
    return shapes_of(lambda: build_denoiser(config, *sizes), "denoiser")


def to_run(entries: Mapping[str, Any]) -> Entries:
    """Of a run that goes on from here: with the codec that these weights come with."""
    return {
        "stage": "ldm",
        "family": "latent_diffusion",
        "builds_on": {"codec": "latest"},
        "denoiser": entries["denoiser"],
        "schedule": entries["schedule"],
        "objective": {"prediction": entries["prediction"]},
        "text": entries["text"],
        "sampling": entries["sampling"],
        "mask_padding": False,
    }


def from_run(model: Mapping[str, Any]) -> Entries:
    wanted = {
        "denoiser.name": (model["denoiser"]["name"], ("unet",)),
        "schedule.name": (model["schedule"]["name"], ("linear", "scaled_linear", "cosine")),
        "objective.prediction": (model["objective"]["prediction"], ("eps", "v", "x0")),
        "mask_padding": (model["mask_padding"], (False,)),
        "text.name": (model["text"]["name"], ("clip", "open_clip", "ldm_bert")),
    }
    for key, (value, allowed) in wanted.items():
        words = ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in allowed)
        check(value in allowed, key, value, f"{words} {NO_FOREIGN_FORM}")
    entries = {key: model[key] for key in ("denoiser", "schedule", "text", "sampling")}
    return entries | {"prediction": model["objective"]["prediction"]}


FORMATS = Formats(
    "text_to_image",
    {"codec": "model.codec.", "denoiser": "model.denoiser.", "text": "model.text."},
    shapes,
    to_run,
    from_run,
)
