"""Autoencoders of LDM and taming-transformers, as what `t2i convert` reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i.config import check
from t2i.families.autoencoder.codec import from_checkpoint
from t2i.families.formats import NO_FOREIGN_FORM, Entries, Formats, Shapes, shapes_of


def shapes(entries: Mapping[str, Any]) -> Shapes:
    """Of the codec's whole state dict."""
    return shapes_of(lambda: from_checkpoint(to_run(entries)), "backbone")


def to_run(entries: Mapping[str, Any]) -> Entries:
    """The losses are left out: no foreign file has their networks."""
    return {
        "stage": "autoencoder",
        "family": "autoencoder",
        "codec": entries["codec"],
        "backbone": entries["backbone"],
        "perceptual": {"name": "none", "weight": 0.0, "weights": None},
        "adversarial": {
            "start_images": None,
            "weight": 0.5,
            "loss": "hinge",
            "base_channels": 64,
            "num_layers": 3,
            "r1_weight": 0.0,
        },
    }


def from_run(model: Mapping[str, Any]) -> Entries:
    name = model["backbone"]["name"]
    check(name in ("ldm", "vit", "dvae"), "backbone.name", name, f"ldm, vit, dvae {NO_FOREIGN_FORM}")
    for key in ("decoder_base_channels", "decoder_res_blocks"):
        value = model["backbone"].get(key)
        check(value is None, f"backbone.{key}", value, f"null {NO_FOREIGN_FORM}")
    factor = model.get("upsampler", {"factor": 1})["factor"]
    check(factor == 1, "upsampler.factor", factor, f"1 {NO_FOREIGN_FORM}")
    codec = model["codec"]
    names = ("kl", "vq", "gumbel")
    check(codec["name"] in names, "codec.name", codec["name"], f"{', '.join(names)} {NO_FOREIGN_FORM}")
    ok = name == "vit" or not codec.get("normalize", False)
    check(
        ok,
        "codec.normalize",
        True,
        "false but with backbone.name=vit (other kinds do not look codes up by cosine)",
    )
    return {"codec": model["codec"], "backbone": model["backbone"]}


FORMATS = Formats("codec", {"codec": "codec."}, shapes, to_run, from_run)
