"""The architecture of a model in CompVis' names, from the shapes of its weights alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2i.errors import CheckpointError
from t2i.interop.diffusers_config import backbone
from t2i.interop.gumbel import GUMBEL, is_gumbel
from t2i.interop.parts import bounded
from t2i.interop.weights import Weights


class Shapes:
    """Looks up shapes, with a sentence where one is not what the architecture has."""

    def __init__(self, weights: Weights, path: Path) -> None:
        self.weights = weights
        self.path = path

    def has(self, name: str) -> bool:
        return name in self.weights

    def size(self, name: str, axis: int, dims: tuple[int, ...]) -> int:
        """One side of a weight that has to have as many axes as one of `dims`."""
        if name not in self.weights:
            raise CheckpointError(f"{self.path} lacks {name}, which tells the model's shape.")
        shape = self.weights[name].shape
        if len(shape) not in dims:
            allowed = " or ".join(map(str, dims))
            raise CheckpointError(f"{name} in {self.path} has shape {shape}; allowed: {allowed} axes.")
        return bounded(shape[axis], f"the shape of {name} in {self.path}", 2**24)

    def multiple(self, name: str, base: int) -> int:
        """Output channels of a convolution, in units of `base`."""
        channels = self.size(name, 0, (4,))
        if channels % base:
            raise CheckpointError(
                f"{name} in {self.path} has {channels} channels; allowed: multiples of {base}."
            )
        return channels // base


def infer_unet(weights: Weights, path: Path) -> dict[str, Any]:
    """The entry denoiser of a UNet in CompVis' names.

    The number of attention heads leaves no trace in shapes. Published: with linear projections (Stable Diffusion
    2) heads are 64 wide, with 1x1 convolutions (Stable Diffusion 1, LDM) there are 8.
    """
    shapes = Shapes(weights, path)
    base = shapes.size("input_blocks.0.0.weight", 0, (4,))
    mult: list[int] = []
    blocks: list[int] = []  # residual blocks per level
    attends: list[bool] = []
    starts = True
    for i in range(1, 1000):
        block = f"input_blocks.{i}"
        if shapes.has(f"{block}.0.op.weight"):
            starts = True
            continue
        if not shapes.has(f"{block}.0.in_layers.2.weight"):
            break
        if starts:
            mult.append(shapes.multiple(f"{block}.0.in_layers.2.weight", base))
            blocks.append(0)
            attends.append(shapes.has(f"{block}.1.norm.weight"))
            starts = False
        blocks[-1] += 1
    if not mult or len(set(blocks)) != 1:
        raise CheckpointError(
            f"{path} has {blocks} residual blocks per level; allowed: the same number in all."
        )
    middle = "middle_block.1"
    depth = sum(shapes.has(f"{middle}.transformer_blocks.{i}.norm1.weight") for i in range(64))
    shapes.size(f"{middle}.proj_in.weight", 0, (2, 4))
    linear = len(weights[f"{middle}.proj_in.weight"].shape) == 2
    return {
        "name": "unet",
        "in_channels": shapes.size("input_blocks.0.0.weight", 1, (4,)),
        "out_channels": shapes.size("out.2.weight", 0, (4,)),
        "model_channels": base,
        "channel_mult": mult,
        "num_res_blocks": blocks[0],
        "attention_resolutions": [2**level for level, attend in enumerate(attends) if attend],
        "num_heads": None if linear else 8,
        "num_head_channels": 64 if linear else None,
        "transformer_depth": max(1, depth),
        "context_dim": shapes.size(f"{middle}.transformer_blocks.0.attn2.to_k.weight", 1, (2,)),
        "use_linear_in_transformer": linear,
        "dropout": 0.0,
    }


def infer_codec(weights: Weights, path: Path) -> dict[str, Any]:
    """The entries codec and backbone of an autoencoder in CompVis' names."""
    shapes = Shapes(weights, path)
    base = shapes.size("encoder.conv_in.weight", 0, (4,))
    mult: list[int] = []
    attends: list[bool] = []
    while len(mult) < 9 and shapes.has(f"encoder.down.{len(mult)}.block.0.conv1.weight"):
        level = f"encoder.down.{len(mult)}"
        mult.append(shapes.multiple(f"{level}.block.0.conv1.weight", base))
        attends.append(shapes.has(f"{level}.attn.0.norm.weight"))
    if not 1 <= len(mult) <= 8:
        raise CheckpointError(f"{path} has an autoencoder of {len(mult)} levels; allowed: 1 to 8.")
    blocks = sum(shapes.has(f"encoder.down.0.block.{i}.conv1.weight") for i in range(16))
    latent = shapes.size("decoder.conv_in.weight", 1, (4,))
    middle = shapes.has("encoder.mid.attn_1.norm.weight")
    codec: dict[str, Any] = {"name": "kl", "kl_weight": 1e-6}
    if shapes.has("quantize.embedding.weight"):
        num_codes, dim = (shapes.size("quantize.embedding.weight", axis, (2,)) for axis in (0, 1))
        codec = {"name": "vq", "num_codes": num_codes, "code_dim": dim}
    elif is_gumbel(weights):
        codec = GUMBEL | {"num_codes": shapes.size("quantize.embed.weight", 0, (2,))}
    return {"codec": codec, "backbone": backbone(base, mult, blocks, latent, attends, middle)}
