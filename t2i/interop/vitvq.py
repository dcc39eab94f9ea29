"""ViT-VQGAN of thuanz123/enhancing-transformers (imagenet_vitvq_small, _base, _large), after 2110.04627."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.config import check
from t2i.errors import CheckpointError
from t2i.interop.compvis_shapes import Shapes
from t2i.interop.parts import CodecPart, Parts, codec_shapes
from t2i.interop.weights import Weight, Weights, fit, stacked

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
    """The codec, its weights unread. Raises CheckpointError where it does not fit."""
    config = infer(Shapes(weights, path))
    wanted = codec_shapes(config)
    names = {ours: published(ours) for ours in wanted}
    found = fit(
        weights,
        {names[ours]: _their_shape(ours, shape) for ours, shape in wanted.items()},
        path,
        "autoencoder",
    )
    taken = {ours: _ours(ours, shape, found[names[ours]]) for ours, shape in wanted.items()}
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
            "unit_range": True,
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


def _ours(ours: str, shape: tuple[int, ...], weight: Weight) -> Weight:
    """The weight as our codec has it."""
    if match := re.search(r"\.attn\.to_([qkv])\.weight$", ours):
        first = "qkv".index(match[1]) * shape[0]
        return weight.rows(first, first + shape[0])
    if ours.endswith(".positions"):
        return Weight(shape, weight.dtype, lambda: weight.read()[0].T.reshape(shape).contiguous())
    return weight.reshaped(*shape)


def check_vitvq(parts: Parts, to: str) -> None:
    """Raises ConfigError where a codec of these networks has no form in what is written, or the file would say less
    than its readers need to know."""
    codec, backbone = parts.codec.config["codec"], parts.codec.config["backbone"]
    alone = to == "compvis" and parts.is_codec
    check(alone, "backbone.name", "vit", "ldm (vit by itself goes into one .safetensors file)")
    as_published = "as a ViT-VQGAN has it"
    check(codec["name"] == "vq", "codec.name", codec["name"], f"vq, {as_published}")
    check(codec["normalize"], "codec.normalize", codec["normalize"], f"true, {as_published}")
    latent, dim = backbone["latent_channels"], codec.get("code_dim")
    check(dim in (None, latent), "codec.code_dim", dim, f"{latent}, as backbone.latent_channels")
    for part in ("encoder", "decoder"):
        sizes = backbone[part]
        for key, value in {"head_dim": HEAD_DIM, "activation": "tanh"}.items():
            check(sizes[key] == value, f"backbone.{part}.{key}", sizes[key], f"{value}, {as_published}")
        # There attention whose only head is as wide as the network has no layer behind it.
        ok = sizes["num_heads"] > 1 or sizes["width"] != HEAD_DIM
        check(ok, f"backbone.{part}.num_heads", 1, f"2 or more with a width of {HEAD_DIM} in a ViT-VQGAN")


def vitvq_weights(codec: CodecPart) -> Weights:
    """Our weights as enhancing-transformers has them. Its pictures are in [0, 1]: of networks that know them in [-1, 1]
    the first and the last layer take that over."""
    ours = (
        codec.weights if codec.config["backbone"].get("unit_range", False) else _of_unit_range(codec.weights)
    )
    found = {}
    for name, weight in ours.items():
        if ".to_q." in name:
            kinds = (name, name.replace(".to_q.", ".to_k."), name.replace(".to_q.", ".to_v."))
            found[published(name)] = stacked([ours[each] for each in kinds])
        elif ".to_k." not in name and ".to_v." not in name:
            found[published(name)] = _theirs(name, weight)
    return found


def _theirs(ours: str, weight: Weight) -> Weight:
    shape = _their_shape(ours, weight.shape)
    if ours.endswith(".positions"):
        return Weight(shape, weight.dtype, lambda: weight.read().flatten(2).movedim(1, 2).contiguous())
    return weight.reshaped(*shape)


def _of_unit_range(weights: Weights) -> Weights:
    """Those of networks that do in [0, 1] what these do in [-1, 1]."""

    def read(name: str) -> Tensor:
        return weights[name].read().double()

    first, last = "encoder.patches", "decoder.pixels"
    changed = {
        f"{first}.weight": lambda: 2 * read(f"{first}.weight"),
        f"{first}.bias": lambda: read(f"{first}.bias") - read(f"{first}.weight").flatten(1).sum(1),
        f"{last}.weight": lambda: read(f"{last}.weight") / 2,
        f"{last}.bias": lambda: (read(f"{last}.bias") + 1) / 2,
    }
    return weights | {
        name: Weight(weights[name].shape, torch.float64, value) for name, value in changed.items()
    }
