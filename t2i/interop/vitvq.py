"""ViT-VQGAN of thuanz123/enhancing-transformers (imagenet_vitvq_small, _base, _large), after 2110.04627."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from t2i.errors import CheckpointError
from t2i.interop.compvis_shapes import Shapes
from t2i.interop.parts import CodecPart, codec_shapes
from t2i.interop.weights import Weight, Weights, fit

HEAD_DIM = 64  # which no shape tells; in all of its configurations
NAMES = (
    (r"\.blocks\.(\d+)\.norm1\.", r".layers.\1.0.norm."),
    (r"\.blocks\.(\d+)\.attn\.to_[qkv]\.", r".layers.\1.0.fn.to_qkv."),
    (r"\.blocks\.(\d+)\.attn\.to_out\.0\.", r".layers.\1.0.fn.to_out."),
    (r"\.blocks\.(\d+)\.norm2\.", r".layers.\1.1.norm."),
    (r"\.blocks\.(\d+)\.mlp\.", r".layers.\1.1.fn.net."),
    (r"^encoder\.patches\.", "encoder.to_patch_embedding.0."),
    (r"^encoder\.transformer\.positions$", "encoder.en_pos_embedding"),
    (r"^decoder\.transformer\.positions$", "decoder.de_pos_embedding"),
    (r"^decoder\.pixels\.", "decoder.to_pixel.1."),
    (r"^quant_conv\.", "pre_quant."),
    (r"^post_quant_conv\.", "post_quant."),
    (r"^codebook\.codes$", "quantizer.embedding.weight"),
)


def is_vitvq(weights: Weights) -> bool:
    return "encoder.to_patch_embedding.0.weight" in weights


def read_vitvq(weights: Weights, path: Path) -> CodecPart:
    """The codec, its weights unread. Its networks see pictures in [0, 1]: the first and the last layer take that over.
    Raises CheckpointError where it does not fit."""
    config = infer(Shapes(weights, path))
    wanted = codec_shapes(config)
    names = {ours: published(ours) for ours in wanted}
    found = fit(
        weights,
        {names[ours]: _their_shape(ours, shape) for ours, shape in wanted.items()},
        path,
        "autoencoder",
    )
    taken = {ours: _ours(ours, shape, found, names[ours]) for ours, shape in wanted.items()}
    return CodecPart(config, taken, 1.0)


def infer(shapes: Shapes) -> dict[str, Any]:
    """The entries codec and backbone. Raises CheckpointError."""
    patch = shapes.size("encoder.to_patch_embedding.0.weight", 2, (4,))
    positions = shapes.size("encoder.en_pos_embedding", 1, (3,))
    side = round(positions**0.5)
    if side**2 != positions:
        raise CheckpointError(
            f"{shapes.path} has {positions} positions; allowed: the square of a whole number."
        )
    num_codes, dim = (shapes.size("quantizer.embedding.weight", axis, (2,)) for axis in (0, 1))

    def transformer(part: str, width: int) -> dict[str, Any]:
        layers = f"{part}.transformer.layers"
        heads = shapes.size(f"{layers}.0.0.fn.to_qkv.weight", 0, (2,)) // (3 * HEAD_DIM)
        depth = sum(shapes.has(f"{layers}.{i}.0.fn.to_qkv.weight") for i in range(256))
        sizes = {"width": width, "depth": depth, "num_heads": max(1, heads), "head_dim": HEAD_DIM}
        return sizes | {"activation": "tanh"}

    return {
        "codec": {"name": "vq", "num_codes": num_codes, "normalize": True},
        "backbone": {
            "name": "vit",
            "patch_px": patch,
            "resolution_px": side * patch,
            "latent_channels": dim,
            "encoder": transformer("encoder", shapes.size("encoder.to_patch_embedding.0.weight", 0, (4,))),
            "decoder": transformer("decoder", shapes.size("decoder.to_pixel.1.weight", 0, (4,))),
        },
    }


def published(ours: str) -> str:
    """Our name of a weight -> its name in the file; queries, keys and values are one there."""
    for pattern, replacement in NAMES:
        ours = re.sub(pattern, replacement, ours)
    return ours


def _their_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if ".to_q." in ours or ".to_k." in ours or ".to_v." in ours:
        return (3 * shape[0], *shape[1:])
    if ours.endswith(".positions"):
        return (1, shape[2] * shape[3], shape[1])
    return shape[:2] if ours in ("quant_conv.weight", "post_quant_conv.weight") else shape


def _ours(ours: str, shape: tuple[int, ...], found: Weights, name: str) -> Weight:
    """The weight as our codec has it."""
    weight = found[name]

    def changed(change: Any) -> Weight:
        return Weight(shape, torch.float64, lambda: change(weight.read().double()))

    if match := re.search(r"\.attn\.to_([qkv])\.weight$", ours):
        first = "qkv".index(match[1]) * shape[0]
        return weight.rows(first, first + shape[0])
    if ours.endswith(".positions"):
        return Weight(shape, weight.dtype, lambda: weight.read()[0].T.reshape(shape).contiguous())
    if ours == "codebook.codes":  # looked up by cosine, and decoded at length 1
        return changed(F.normalize)
    if ours == "encoder.patches.weight":
        return changed(lambda w: w / 2)
    if ours == "encoder.patches.bias":
        patches = found[published("encoder.patches.weight")]
        return changed(lambda b: b + patches.read().double().flatten(1).sum(1) / 2)
    if ours == "decoder.pixels.weight":
        return changed(lambda w: 2 * w)
    if ours == "decoder.pixels.bias":
        return changed(lambda b: 2 * b - 1)
    return weight.reshaped(*shape)
