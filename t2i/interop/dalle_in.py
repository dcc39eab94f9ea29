"""DALL-E's discrete VAE: a folder of the encoder's and the decoder's weights, or FLAVA's copy of the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2i.config import check
from t2i.errors import CheckpointError
from t2i.interop.compvis_shapes import Shapes
from t2i.interop.folder import component_weights, inside, read_json
from t2i.interop.parts import CodecPart, Parts, codec_shapes, is_one_of
from t2i.interop.reading import read_weights
from t2i.interop.weights import Weight, Weights, fit

ENDINGS = ("safetensors", "pt", "pth", "bin", "pkl")
FLAVA = "flava_image_codebook"
# The recipe of 2102.12092, appendix A.2, in pictures, which no file says: to go on from.
GUMBEL = {
    "name": "gumbel",
    "kl_weight": 6.6,
    "kl_warmup_images": 2_560_000,
    "start_temperature": 1.0,
    "end_temperature": 0.0625,
    "anneal_images": 76_800_000,
}


def is_dalle(folder: Path) -> bool:
    """Whether a folder holds one of the networks, under the names that `read_dalle` looks for."""
    return _is_flava(folder) or any(_file(folder, part) is not None for part in ("encoder", "decoder"))


def read_dalle(folder: Path) -> Parts:
    """The codec, its weights unread. Raises CheckpointError where one of the networks is not there or does not fit."""
    notes: list[str] = []
    if _is_flava(folder):
        encoder, encoder_file = component_weights(folder, "", "model", True, notes)
    else:
        encoder, encoder_file = _weights(folder, "encoder")
    decoder, decoder_file = _weights(folder, "decoder")
    encoder, decoder = _present_names(encoder), _present_names(decoder)
    shapes, latents = Shapes(encoder, encoder_file), Shapes(decoder, decoder_file)
    num_codes = shapes.size("blocks.output.conv.weight", 0, (4,))
    config: dict[str, Any] = {
        "codec": GUMBEL | {"num_codes": num_codes},
        "backbone": {
            "name": "dvae",
            "width": shapes.size("blocks.input.weight", 0, (4,)),
            "blocks_per_group": sum(shapes.has(f"{block(i)}.res_path.conv_1.weight") for i in range(16)),
            "latent_channels": latents.size("blocks.input.weight", 0, (4,)),
        },
    }
    if _is_flava(folder):
        _check_said(folder, config)
    wanted = codec_shapes(config)
    encoder_wanted, decoder_wanted = {}, {}
    for ours, shape in wanted.items():
        if is_encoders(ours):
            encoder_wanted[published(ours)] = shape
        else:
            decoder_wanted[published(ours)] = (*reversed(shape), 1, 1) if ours == "codebook.codes" else shape
    found = {"encoder": fit(encoder, encoder_wanted, encoder_file, "encoder")}
    found["decoder"] = fit(decoder, decoder_wanted, decoder_file, "decoder")
    weights = {}
    for ours in wanted:
        part = "encoder" if is_encoders(ours) else "decoder"
        weight = found[part][published(ours)]
        weights[ours] = _as_codes(weight) if ours == "codebook.codes" else weight
    return Parts("DALL-E's discrete VAE", CodecPart(config, weights, 1.0), notes=notes)


def is_encoders(ours: str) -> bool:
    """Whether the published encoder has a weight, or the published decoder."""
    return ours.startswith(("encoder.", "quant_conv."))


def published(ours: str) -> str:
    """Our name of a weight -> that in the published encoder or decoder."""
    fixed = {"codebook.codes": "blocks.input.weight", "decoder.bias": "blocks.input.bias"}
    name = ours.replace("quant_conv.", "encoder.blocks.output.conv.")
    return fixed.get(ours) or name.removeprefix("encoder.").removeprefix("decoder.")


def block(i: int) -> str:
    return f"blocks.group_1.block_{i + 1}"


def _present_names(weights: Weights) -> Weights:
    """Of dall_e's own layers (w, b) or of FLAVA's modules, as torch would name the same layers."""

    def named(name: str) -> str:
        name = name.removeprefix("image_codebook.").replace(".group.", ".").replace(".path.", ".")
        module, _, parameter = name.rpartition(".")
        return f"{module}.{ {'w': 'weight', 'b': 'bias'}.get(parameter, parameter) }"

    return {named(name): weight for name, weight in weights.items()}


def _as_codes(weight: Weight) -> Weight:
    """A 1x1 convolution (D, num_codes, 1, 1) that takes one of num_codes channels, as a codebook (num_codes, D)."""
    dim, num_codes = weight.shape[:2]
    return Weight(
        (num_codes, dim), weight.dtype, lambda: weight.read().reshape(dim, num_codes).T.contiguous()
    )


def _is_flava(folder: Path) -> bool:
    return (folder / "config.json").exists() and read_json(folder, "config.json").get("model_type") == FLAVA


def _check_said(folder: Path, config: dict[str, Any]) -> None:
    """Raises ConfigError where FLAVA's configuration says other sizes than its weights have."""
    said, backbone = read_json(folder, "config.json"), config["backbone"]
    sizes = {
        "hidden_size": backbone["width"],
        "num_blocks_per_group": backbone["blocks_per_group"],
        "vocab_size": config["codec"]["num_codes"],
    }
    for key, size in sizes.items():
        found = said.get(key, size)
        check(
            is_one_of(found, [size]),
            f"{folder / 'config.json'}: {key}",
            found,
            f"{size}, as its weights have",
        )


def _file(folder: Path, part: str) -> str | None:
    names = (f"{part}.{ending}" for ending in ENDINGS)
    return next((name for name in names if (folder / name).is_file()), None)


def _weights(folder: Path, part: str) -> tuple[Weights, Path]:
    name = _file(folder, part)
    if name is None:
        allowed = ", ".join(f"{part}.{ending}" for ending in ENDINGS[:2])
        raise CheckpointError(f"{folder} has no {part} of DALL-E's discrete VAE; allowed: {allowed}.")
    path = inside(folder, name)
    return read_weights(path), path
