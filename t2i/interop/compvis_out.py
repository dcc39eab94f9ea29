"""One .safetensors file with CompVis' names, which most tools read."""

from __future__ import annotations

from pathlib import Path

import torch

from t2i.config import check, parse
from t2i.diffusion.config import ScheduleConfig
from t2i.diffusion.schedules import configured_betas
from t2i.interop.clip import ClipText, to_open_clip
from t2i.interop.compvis_in import BERT, CLIP, CODEC, LATENT_SCALE, OPEN_CLIP, UNET
from t2i.interop.compvis_shapes import infer_unet
from t2i.interop.gumbel import taming_weights
from t2i.interop.names import compvis_codec
from t2i.interop.parts import Parts
from t2i.interop.scheduler import SCHEDULE
from t2i.interop.vitvq import vitvq_weights
from t2i.interop.weights import Weights, in_memory, renamed
from t2i.interop.writing import Progress, write_safetensors


def write_compvis(parts: Parts, path: Path, dtype: torch.dtype, progress: Progress) -> None:
    """An autoencoder by itself is written with taming's names, a ViT-VQGAN with those of enhancing-transformers.
    Prediction and resolution stand in the header as the ModelSpec of Stability has them."""
    header = {"format": "pt"}
    if parts.denoiser is not None:
        size, prediction = parts.denoiser.size_px, parts.denoiser.prediction
        header |= {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.prediction_type": {"eps": "epsilon"}.get(prediction, prediction),
            "modelspec.resolution": f"{size}x{size}",
        }
    write_safetensors(path, compvis_weights(parts), dtype, header, progress)


def compvis_weights(parts: Parts) -> Weights:
    """All weights, with CompVis' names."""
    if parts.codec.is_vit:
        return vitvq_weights(parts.codec)
    if parts.codec.config["codec"]["name"] == "gumbel":
        return taming_weights(parts.codec.weights)
    names = compvis_codec(parts.codec.weights)
    codec = {names[ours]: weight for ours, weight in parts.codec.weights.items()}
    if parts.denoiser is None:
        return codec
    _check_heads(parts)
    weights = renamed(parts.denoiser.weights, UNET) | renamed(codec, CODEC)
    if not isinstance(parts.text, ClipText):
        assert parts.text is not None
        weights |= renamed(parts.text.weights, BERT)
    elif parts.text.config.hidden_act == "gelu":  # OpenCLIP's, in Stable Diffusion 2
        weights |= renamed(to_open_clip(parts.text.weights), OPEN_CLIP)
    else:
        weights |= renamed(parts.text.weights, CLIP + "text_model.")
    # What CompVis' code has as buffers too, where it is not Stable Diffusion's.
    if parts.codec.latent_scale != LATENT_SCALE:
        weights["scale_factor"] = in_memory(torch.tensor(parts.codec.latent_scale))
    schedule = parse(ScheduleConfig, parts.denoiser.schedule, "schedule.")
    if schedule != parse(ScheduleConfig, SCHEDULE):
        weights["betas"] = in_memory(configured_betas(schedule).float(), exact=True)
    return weights


def _check_heads(parts: Parts) -> None:
    """Raises ConfigError where readers of the file, who see shapes only, would take another number of heads."""
    assert parts.denoiser is not None
    shapes = infer_unet(parts.denoiser.weights, Path("the UNet"))
    for key in ("num_heads", "num_head_channels"):
        value, assumed = parts.denoiser.config[key], shapes[key]
        check(value == assumed, f"denoiser.{key}", value, f"{assumed} in a single file with such a UNet")
    if isinstance(parts.text, ClipText):
        heads = parts.text.config.num_attention_heads
        assumed = max(1, parts.text.config.hidden_size // 64)
        check(heads == assumed, "text_encoder.num_attention_heads", heads, f"{assumed} in a single file")
