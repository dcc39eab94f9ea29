"""DALL-E's discrete VAE as a folder: the encoder as transformers' FlavaImageCodebook loads it, beside it the decoder
with the names of the package dall_e, which no class of transformers has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from t2i.config import check
from t2i.interop.dalle_in import FLAVA, is_encoders, published
from t2i.interop.parts import CodecPart, Parts
from t2i.interop.weights import Weight
from t2i.interop.writing import Progress, write_safetensors


def check_dalle(parts: Parts, to: str) -> None:
    """Raises ConfigError where a codec of these networks has no form in what is written."""
    name = parts.codec.config["codec"]["name"]
    check(name == "gumbel", "codec.name", name, "gumbel with backbone.name=dvae")
    alone = to == "diffusers" and parts.is_codec
    check(alone, "backbone.name", "dvae", "ldm (dvae by itself goes into a folder, by --to diffusers)")


def write_dalle(codec: CodecPart, folder: Path, dtype: torch.dtype, progress: Progress) -> None:
    encoder = {_flava(published(name)): each for name, each in codec.weights.items() if is_encoders(name)}
    decoder = {
        _dall_e(published(name)): _as_convolution(each) if name == "codebook.codes" else each
        for name, each in codec.weights.items()
        if not is_encoders(name)
    }
    backbone = codec.config["backbone"]
    values = {
        "architectures": ["FlavaImageCodebook"],
        "hidden_size": backbone["width"],
        "model_type": FLAVA,
        "num_blocks_per_group": backbone["blocks_per_group"],
        "vocab_size": codec.config["codec"]["num_codes"],
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    write_safetensors(folder / "model.safetensors", encoder, dtype, {"format": "pt"}, progress)
    write_safetensors(folder / "decoder.safetensors", decoder, dtype, {"format": "pt"}, progress)


def _flava(name: str) -> str:
    return re.sub(r"(group_\d+)\.", r"\1.group.", name).replace(".res_path.", ".res_path.path.")


def _dall_e(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{module}.{parameter[0]}"  # w, b


def _as_convolution(codes: Weight) -> Weight:
    """A codebook (num_codes, D) as a 1x1 convolution (D, num_codes, 1, 1) that takes one of num_codes channels."""
    return Weight(
        (*reversed(codes.shape), 1, 1), codes.dtype, lambda: codes.read().T.contiguous()[:, :, None, None]
    )
