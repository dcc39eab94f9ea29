"""A directory that from_pretrained of diffusers' StableDiffusionPipeline or AmusedPipeline loads as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from t2i.config import check
from t2i.interop.amused import amused_files
from t2i.interop.card import model_card
from t2i.interop.clip import ClipText, with_max_tokens
from t2i.interop.dalle_out import write_dalle
from t2i.interop.diffusers_config import write_codec, write_unet
from t2i.interop.diffusers_in import STEM
from t2i.interop.names import codec_attention_matrix, diffusers_codec, diffusers_unet
from t2i.interop.parts import CodecPart, DenoiserPart, Parts, TransformerPart
from t2i.interop.run_out import write_clip, write_files
from t2i.interop.scheduler import write_scheduler
from t2i.interop.weights import Weights
from t2i.interop.writing import Progress, write_safetensors

HEADER = {"format": "pt"}  # what diffusers asks of a .safetensors file


def write_diffusers(parts: Parts, folder: Path, dtype: torch.dtype, progress: Progress) -> None:
    """model_index.json and the parts' folders; of an autoencoder by itself its folder alone, of
    DALL-E's discrete VAE transformers'."""
    folder.mkdir(parents=True)
    if parts.transformer is not None:
        _write_amused(parts, parts.transformer, folder, dtype, progress)
    elif parts.denoiser is not None:
        _write_stable_diffusion(parts, parts.denoiser, folder, dtype, progress)
    elif parts.codec.is_dvae:
        write_dalle(parts.codec, folder, dtype, progress)
    else:
        _write_codec(parts.codec, folder, parts.size_px, dtype, progress)
    (folder / "README.md").write_text(model_card(parts))


def _write_amused(
    parts: Parts, transformer: TransformerPart, folder: Path, dtype: torch.dtype, progress: Progress
) -> None:
    for name, values in amused_files(parts).items():
        write_json(folder / name, values)
    assert isinstance(parts.text, ClipText)
    _write_text(parts.text, folder, dtype, progress)
    _write_codec(parts.codec, folder / "vqvae", transformer.size_px, dtype, progress)
    place = folder / f"transformer/{STEM}.safetensors"
    write_safetensors(place, transformer.weights, dtype, HEADER, progress)


def _write_stable_diffusion(
    parts: Parts, denoiser: DenoiserPart, folder: Path, dtype: torch.dtype, progress: Progress
) -> None:
    text = parts.text
    check(not parts.codec.quantised, "codec.name", "vq", "kl in a StableDiffusionPipeline")
    kind = "clip" if isinstance(text, ClipText) else "ldm_bert"
    check(
        kind == "clip",
        "text.name",
        kind,
        "clip, open_clip in a StableDiffusionPipeline; any as a .safetensors file",
    )
    assert isinstance(text, ClipText)
    scheduler = write_scheduler(denoiser.schedule, denoiser.prediction, denoiser.sampling)
    index = {
        "_class_name": f"StableDiffusion{'Inpaint' if denoiser.config.get('masks') else ''}Pipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    _write_text(text, folder, dtype, progress)
    _write_codec(parts.codec, folder / "vae", denoiser.size_px, dtype, progress)
    unet = write_unet(denoiser.config, denoiser.size_px, parts.codec.downsampling)
    write_json(folder / "unet/config.json", unet)
    names = diffusers_unet(denoiser.weights, denoiser.config["num_res_blocks"])
    weights = {names[ours]: weight for ours, weight in denoiser.weights.items()}
    write_safetensors(folder / f"unet/{STEM}.safetensors", weights, dtype, HEADER, progress)


def _write_text(text: ClipText, folder: Path, dtype: torch.dtype, progress: Progress) -> None:
    write_files(folder / "tokenizer", with_max_tokens(text.tokenizer, text.max_tokens))
    write_clip(text, folder / "text_encoder", dtype, progress, tokenizer=False)


def _write_codec(
    codec: CodecPart, folder: Path, size_px: int, dtype: torch.dtype, progress: Progress
) -> None:
    write_json(folder / "config.json", write_codec(codec.config, codec.latent_scale, size_px))
    write_safetensors(folder / f"{STEM}.safetensors", codec_weights(codec), dtype, HEADER, progress)


def codec_weights(codec: CodecPart) -> Weights:
    """The codec's weights as diffusers names and shapes them."""
    names = diffusers_codec(codec.weights, len(codec.config["backbone"]["channel_mult"]))
    return {
        names[ours]: weight.reshaped(*weight.shape[:2]) if codec_attention_matrix(ours) else weight
        for ours, weight in codec.weights.items()
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
