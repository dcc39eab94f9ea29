"""Our names of weights, which are CompVis', and diffusers' names of the same."""

from __future__ import annotations

import re
from collections.abc import Iterable

from t2i.interop.weights import Weights

UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}

CODEC = (
    (r"^codebook\.codes$", "quantize.embedding.weight"),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
)
CODEC_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Until 2023 diffusers named the same layers so, and the published Stable Diffusion 1 still does.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_unet(names: Iterable[str], num_res_blocks: int) -> dict[str, str]:
    """Our names of a UNet's weights -> diffusers' names."""
    return {name: _diffusers_unet_name(name, num_res_blocks) for name in names}


def _diffusers_unet_name(name: str, num_res_blocks: int) -> str:
    module, _, parameter = name.rpartition(".")
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{parameter}"
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", module):
        place, inner = f"mid_block.{UNET_MIDDLE[match[1]]}", match[2]
        return f"{place}.{UNET_RESIDUAL.get(inner, inner)}.{parameter}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", module)
    assert match is not None, name
    way, inner = {"input": "down", "output": "up"}[match[1]], match[4]
    # A level ends with its downsampling on the way down, with one more residual block on the way up.
    level, layer = divmod(int(match[2]) - (way == "down"), num_res_blocks + 1)
    if inner in ("op", "conv"):
        return f"{way}_blocks.{level}.{way}samplers.0.conv.{parameter}"
    place = f"{way}_blocks.{level}.{'attentions' if match[3] == '1' else 'resnets'}.{layer}"
    return f"{place}.{UNET_RESIDUAL.get(inner, inner)}.{parameter}"


def diffusers_codec(names: Iterable[str], num_levels: int) -> dict[str, str]:
    """Our names of an autoencoder's weights -> diffusers' names."""

    def named(name: str) -> str:
        for pattern, replacement in CODEC:
            name = re.sub(pattern, replacement, name)
        # diffusers counts the decoder's levels from the lowest resolution, in the order they run.
        name = re.sub(r"\.up\.(\d+)\.", lambda found: f".up_blocks.{num_levels - 1 - int(found[1])}.", name)
        if match := re.fullmatch(r"(.+\.attentions\.\d+)\.(\w+)\.(\w+)", name):
            name = f"{match[1]}.{CODEC_ATTENTION[match[2]]}.{match[3]}"
        return name

    return {name: named(name) for name in names}


def codec_attention_matrix(name: str) -> bool:
    """Whether our weight is a 1x1 convolution (C, C, 1, 1) that diffusers has as a matrix (C, C)."""
    return re.search(r"\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.weight$", name) is not None


def with_present_attention_names(weights: Weights) -> Weights:
    """An autoencoder's weights under the names that diffusers gives its attention layers today."""

    def named(name: str) -> str:
        match = re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(\w+)", name)
        return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}" if match else name

    return {named(name): weight for name, weight in weights.items()}


def compvis_codec(names: Iterable[str]) -> dict[str, str]:
    """Our names of an autoencoder's weights -> CompVis' and taming's."""
    return {n: "quantize.embedding.weight" if n == "codebook.codes" else n for n in names}


def averaged(name: str) -> str:
    """CompVis' name for the moving average of the parameter `name`: LitEma takes the dots out."""
    return "model_ema." + name.replace(".", "")
