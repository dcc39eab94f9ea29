"""GumbelVQ of taming-transformers (vqgan_gumbel_f8, which ruDALL-E draws with too)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.config import check
from t2i.interop.parts import Parts, codec_shapes
from t2i.interop.weights import Weight, Weights, fit, in_memory

# To go on from, as no file says it: the weight that vqgan_gumbel_f8 was trained with, 1e-8 KL(q || uniform), as ours
# is put (a code stands for 3 x 8 x 8 values of the picture); the temperature that DALL-E ends with (2102.12092,
# appendix A.2).
GUMBEL: dict[str, Any] = {
    "name": "gumbel",
    "kl_weight": 1e-8 * 3 * 8**2,
    "kl_warmup_images": 0,
    "start_temperature": 1 / 16,
    "end_temperature": 1 / 16,
    "anneal_images": 0,
}


def is_gumbel(weights: Weights) -> bool:
    return "quantize.proj.weight" in weights


def gumbel_weights(config: dict[str, Any], weights: Weights, path: Path) -> Weights:
    """GumbelVQ's weights by our names. The 1x1 convolution behind the encoder and the one that gives the logits of the
    codes, which follow each other, become one. Raises CheckpointError where they do not fit."""
    wanted = codec_shapes(config)
    num_codes, width = wanted["codebook.codes"]
    theirs = {name: name for name in wanted if not name.startswith("quant_conv.")}
    theirs["codebook.codes"] = "quantize.embed.weight"
    shapes = {theirs[ours]: wanted[ours] for ours in theirs}
    for name, rows in {"quant_conv": width, "quantize.proj": num_codes}.items():
        shapes |= {f"{name}.weight": (rows, width, 1, 1), f"{name}.bias": (rows,)}
    found = fit(weights, shapes, path, "autoencoder")

    def numbers(name: str) -> Tensor:
        return found[name].read().double().flatten(1)

    def weight() -> Tensor:
        return (numbers("quantize.proj.weight") @ numbers("quant_conv.weight"))[:, :, None, None]

    def bias() -> Tensor:
        inner, outer = (found[f"{name}.bias"].read().double() for name in ("quant_conv", "quantize.proj"))
        return numbers("quantize.proj.weight") @ inner + outer

    return {ours: found[name] for ours, name in theirs.items()} | {
        "quant_conv.weight": Weight((num_codes, width, 1, 1), torch.float64, weight),
        "quant_conv.bias": Weight((num_codes,), torch.float64, bias),
    }


def check_gumbel(parts: Parts, to: str) -> None:
    """Raises ConfigError where a codec of Gumbel's has no form in what is written."""
    config = parts.codec.config
    alone = to == "compvis" and parts.is_codec
    check(alone, "codec.name", "gumbel", "kl, vq (gumbel by itself goes into one .safetensors file)")
    dim, latent = parts.codec.weights["codebook.codes"].shape[1], config["backbone"]["latent_channels"]
    check(dim == latent, "codec.code_dim", dim, f"{latent} in a GumbelVQ, as backbone.latent_channels")


def taming_weights(weights: Weights) -> Weights:
    """Our weights as GumbelVQ has them: the first of its two convolutions changes nothing."""
    logits = weights["quant_conv.weight"]
    width = logits.shape[1]
    return {name: weight for name, weight in weights.items() if name != "codebook.codes"} | {
        "quant_conv.weight": in_memory(torch.eye(width)[:, :, None, None]),
        "quant_conv.bias": in_memory(torch.zeros(width)),
        "quantize.proj.weight": logits,
        "quantize.proj.bias": weights["quant_conv.bias"],
        "quantize.embed.weight": weights["codebook.codes"],
    }
