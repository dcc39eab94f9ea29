"""The model card: what a model is and how it was made, for whoever finds the folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from t2i.interop.parts import Parts
from t2i.interop.weights import Weights

UNKNOWN = "unknown"  # data.shards of a run that was itself converted: nobody told how it was trained

PIPELINE = """```python
import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("THIS_FOLDER", torch_dtype=torch.float32)
pipeline("a red bicycle", generator=torch.Generator("cpu").manual_seed(0)).images[0].save("bicycle.png")
```"""
AMUSED = PIPELINE.replace("StableDiffusionPipeline", "AmusedPipeline")
AUTOENCODER = """```python
from diffusers import {kind}

autoencoder = {kind}.from_pretrained("THIS_FOLDER")
```"""
DVAE = """```python
from safetensors.torch import load_file
from transformers import FlavaImageCodebook

encoder = FlavaImageCodebook.from_pretrained("THIS_FOLDER")
decoder = load_file("THIS_FOLDER/decoder.safetensors")  # the weights of dall_e's Decoder, by its names
```"""


def model_card(parts: Parts) -> str:
    """README.md of a folder that others load. Names no path of the machine it was made on."""
    pipeline = not parts.is_codec
    is_dvae = parts.codec.is_dvae
    head = [f"library_name: {'transformers' if is_dvae else 'diffusers'}", "license: unknown", "tags: [t2i]"]
    head += ["pipeline_tag: text-to-image"] if pipeline else []
    codec = "VQModel" if parts.codec.quantised else "AutoencoderKL"
    title, code = "Image autoencoder", DVAE if is_dvae else AUTOENCODER.format(kind=codec)
    if parts.denoiser is not None:
        title, code = "Text-to-image latent diffusion model", PIPELINE
    if parts.transformer is not None:
        title, code = "Text-to-image masked model of codes (aMUSEd)", AMUSED
    sections = [
        "---\n" + "\n".join(head) + "\n---",
        f"# {title}",
        f"Converted by `t2i convert` from {parts.kind}.",
        _table(["part", "parameters", "what it is"], _rows(parts)),
        "## How to load it",
        code,
        "There is no safety checker in it." if pipeline else "",
        "## How it was trained",
        _recipe(parts.run),
        "## Licence",
        "Unknown: whoever publishes this folder has to say. What the data and a frozen text encoder allow applies "
        "to it too.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _rows(parts: Parts) -> list[list[str]]:
    backbone = parts.codec.config["backbone"]
    what = f"{parts.codec.kind}, f{parts.codec.downsampling}, {backbone['latent_channels']} channels, latents times "
    rows = [["autoencoder", _count(parts.codec.weights), f"{what}{parts.codec.latent_scale:g}"]]
    if parts.transformer is not None:
        uvit = f"U-ViT over codes at {parts.transformer.size_px} px"
        rows.append(["transformer", _count(parts.transformer.weights), uvit])
    if parts.denoiser is not None:
        unet = f"UNet at {parts.denoiser.size_px} px, predicts {parts.denoiser.prediction}"
        rows.append(["denoiser", _count(parts.denoiser.weights), unet])
    if parts.text is not None:
        text = f"text encoder, {parts.text.max_tokens} tokens of width {parts.text.token_dim}"
        rows.append(["text", _count(parts.text.saved_weights), text])
    return rows


def _count(weights: Weights) -> str:
    return f"{sum(math.prod(weight.shape) for weight in weights.values()):,}"


def _recipe(run: Mapping[str, Any] | None) -> str:
    """What of the run's configuration someone would need to repeat it."""
    if run is None or run["data"]["shards"] == UNKNOWN:
        return "Not known to the converter."
    data, trainer, optimizer, resolution = (run[k] for k in ("data", "trainer", "optimizer", "resolution"))
    shards = data["shards"] if isinstance(data["shards"], list) else [data["shards"] or ""]
    names = ", ".join(PurePosixPath(shard).name for shard in shards[:3]) + (
        ", ..." if len(shards) > 3 else ""
    )
    processes = trainer["devices"] * trainer["num_nodes"]
    values = {
        "data.source": data["source"],
        "data.shards": names,
        "data.caption_keys": ", ".join(data["caption_keys"]),
        "data.crop": data["crop"],
        "data.horizontal_flip": data["horizontal_flip"],
        "resolution.size_px": resolution["size_px"],
        "resolution.min_original_px": resolution["min_original_px"],
        "resolution.text_dropout": resolution["text_dropout"],
        "trainer.num_images": trainer["num_images"],
        "trainer.global_batch_size": trainer.get("global_batch_size") or trainer["batch_size"] * processes,
        "trainer.devices": processes,
        "trainer.precision": trainer["precision"],
        "optimizer.learning_rate": optimizer["learning_rate"],
        "optimizer.betas": ", ".join(map(str, optimizer["betas"])),
        "optimizer.weight_decay": optimizer["weight_decay"],
        "optimizer.warmup_images": optimizer["warmup_images"],
        "ema.half_life_images": run["ema"] and run["ema"]["half_life_images"],
        "seed": run["seed"],
    }
    model = run["model"]
    for key in ("objective", "schedule", "codec"):
        values |= {f"{key}.{name}": value for name, value in model.get(key, {}).items()}
    return _table(["key", "value"], [[f"`{key}`", str(value)] for key, value in values.items()])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
