"""diffusers' configurations and ours. What a configuration says is only compared with these tables: nothing is
looked up by a name that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i.config import check
from t2i.interop.parts import bounded, input_channels, is_one_of, scale

UNET_CLASS, KL_CLASS, VQ_CLASS = "UNet2DConditionModel", "AutoencoderKL", "VQModel"

# Entries that have one value in the models that we have; the first is diffusers' default.
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "norm_num_groups": (32,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
CODEC_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "in_channels": (3,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "norm_num_groups": (32,),
    "norm_type": ("group",),
    "out_channels": (3,),
    "shift_factor": (None, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}


def check_fixed(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], place: str) -> None:
    """Raises ConfigError where an entry asks for what our models do not have."""
    for key, allowed in fixed.items():
        value = values.get(key, allowed[0])
        check(is_one_of(value, allowed), f"{place}: {key}", value, " or ".join(map(repr, allowed)))


def _levels(values: Mapping[str, Any], place: str, kinds: tuple[str, str], up: tuple[str, str]) -> list[bool]:
    """Per level from full resolution on: whether it attends. kinds, up: the names of the block types without
    and with attention, on the way down and on the way up."""
    widths, down = values.get("block_out_channels"), values.get("down_block_types")
    ok = isinstance(widths, list) and 1 <= len(widths) <= 8
    check(ok, f"{place}: block_out_channels", widths, "a list of 1 to 8 numbers")
    assert isinstance(widths, list)
    ok = isinstance(down, list) and len(down) == len(widths) and all(kind in kinds for kind in down)
    check(ok, f"{place}: down_block_types", down, f"one of {' or '.join(kinds)} per level")
    assert isinstance(down, list)
    attends = [kind == kinds[1] for kind in down]
    wanted = [up[attend] for attend in reversed(attends)]
    check(
        values.get("up_block_types") == wanted,
        f"{place}: up_block_types",
        values.get("up_block_types"),
        str(wanted),
    )
    return attends


def _widths(values: Mapping[str, Any], place: str) -> tuple[int, list[int]]:
    """The first level's channels, and each level's as a multiple of them."""
    widths = [bounded(w, f"{place}: block_out_channels", 16_384) for w in values["block_out_channels"]]
    base = widths[0]
    ok = all(width % base == 0 for width in widths)
    check(ok, f"{place}: block_out_channels", widths, "multiples of the first")
    return base, [width // base for width in widths]


def _blocks(values: Mapping[str, Any], place: str, default: int) -> int:
    return bounded(values.get("layers_per_block", default), f"{place}: layers_per_block", 16)


def read_unet(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """UNet2DConditionModel's configuration -> the entry denoiser. Raises ConfigError.

    `attention_head_dim` is, by a mistake that diffusers keeps for the published files' sake, the number of
    heads: one for all levels (Stable Diffusion 1) or one per level (Stable Diffusion 2).
    """
    check_fixed(values, UNET_FIXED, place)
    attends = _levels(
        values, place, ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    )
    base, mult = _widths(values, place)
    heads = values.get("num_attention_heads")
    heads = values.get("attention_head_dim", 8) if heads is None else heads
    per_level = heads if isinstance(heads, list) else [heads] * len(mult)
    key = f"{place}: attention_head_dim"
    check(len(per_level) == len(mult), key, heads, f"one number, or {len(mult)}")
    per_level = [bounded(number, key, 1024) for number in per_level]
    linear = values.get("use_linear_projection", False)
    check(type(linear) is bool, f"{place}: use_linear_projection", linear, "true or false")
    config: dict[str, Any] = {
        "name": "unet",
        "in_channels": bounded(values.get("in_channels", 4), f"{place}: in_channels", 1024),
        "out_channels": bounded(values.get("out_channels", 4), f"{place}: out_channels", 1024),
        "model_channels": base,
        "channel_mult": mult,
        "num_res_blocks": _blocks(values, place, 2),
        "attention_resolutions": [2**level for level, attend in enumerate(attends) if attend],
        "transformer_depth": bounded(
            values.get("transformer_layers_per_block", 1), f"{place}: transformer_layers_per_block", 64
        ),
        "context_dim": bounded(
            values.get("cross_attention_dim", 1280), f"{place}: cross_attention_dim", 16_384
        ),
        "use_linear_in_transformer": linear,
        "dropout": 0.0,
    }
    if len(set(per_level)) == 1:
        return config | {"num_heads": per_level[0], "num_head_channels": None}
    sizes = {base * m / number for m, number in zip(mult, per_level, strict=True)}
    check(len(sizes) == 1, key, heads, "the same number, or heads of the same width, at every level")
    return config | {"num_heads": None, "num_head_channels": int(sizes.pop())}


def write_unet(config: Mapping[str, Any], size_px: int, downsampling: int) -> dict[str, Any]:
    """The inverse of `read_unet`."""
    widths = [config["model_channels"] * m for m in config["channel_mult"]]
    attends = [2**level in config["attention_resolutions"] for level in range(len(widths))]
    if config["num_heads"] is not None:
        heads: int | list[int] = config["num_heads"]
    else:
        heads = [max(1, width // config["num_head_channels"]) for width in widths]
    return {
        "_class_name": UNET_CLASS,
        **{key: allowed[0] for key, allowed in UNET_FIXED.items()},
        "sample_size": size_px // downsampling,
        "in_channels": input_channels(config),
        "out_channels": config["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": config["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": heads,
        "transformer_layers_per_block": config["transformer_depth"],
        "cross_attention_dim": config["context_dim"],
        "use_linear_projection": config["use_linear_in_transformer"],
    }


def read_codec(values: Mapping[str, Any], place: str) -> tuple[dict[str, Any], float]:
    """AutoencoderKL's or VQModel's configuration -> the entries codec and backbone, and the latent scale.
    (`lookup_from_codebook` only lets VQModel.decode take codes, as `TokenCodec.decode_tokens` does.)"""
    check_fixed(values, CODEC_FIXED, place)
    attends = _levels(
        values,
        place,
        ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    )
    base, mult = _widths(values, place)
    quantised = values.get("_class_name") == VQ_CLASS
    latent = bounded(values.get("latent_channels", 3 if quantised else 4), f"{place}: latent_channels", 4096)
    codec: dict[str, Any] = {"name": "kl", "kl_weight": 1e-6}
    if quantised:
        dim = values.get("vq_embed_dim")
        num_codes = bounded(values.get("num_vq_embeddings", 256), f"{place}: num_vq_embeddings", 2**24)
        check(num_codes > 1, f"{place}: num_vq_embeddings", num_codes, "2 or more")
        codec = {"name": "vq", "num_codes": num_codes}
        if dim is not None:
            codec["code_dim"] = bounded(dim, f"{place}: vq_embed_dim", 4096)
    middle = values.get("mid_block_add_attention", True)
    check(type(middle) is bool, f"{place}: mid_block_add_attention", middle, "true or false")
    latent_scale = scale(values.get("scaling_factor", 0.18215), f"{place}: scaling_factor")
    return {
        "codec": codec,
        "backbone": backbone(base, mult, _blocks(values, place, 1), latent, attends, middle),
    }, latent_scale


def backbone(
    base: int,
    mult: list[int],
    num_res_blocks: int,
    latent_channels: int,
    attends: list[bool],
    mid_attention: bool,
) -> dict[str, Any]:
    """The entry backbone of an autoencoder run. Attention is placed for pictures of 256 px; the networks are
    convolutional, and take any."""
    return {
        "name": "ldm",
        "base_channels": base,
        "channel_mult": mult,
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": [256 >> level for level, attend in enumerate(attends) if attend],
        "resolution_px": 256,
        "latent_channels": latent_channels,
        "dropout": 0.0,
        "mid_attention": mid_attention,
    }


def write_codec(config: Mapping[str, Any], latent_scale: float, size_px: int) -> dict[str, Any]:
    """The inverse of `read_codec`."""
    shape, codec = config["backbone"], config["codec"]
    sides = [shape["resolution_px"] >> level for level in range(len(shape["channel_mult"]))]
    attends = [side in shape["attention_resolutions"] for side in sides]
    values = {
        "_class_name": KL_CLASS,
        "act_fn": "silu",
        "block_out_channels": [shape["base_channels"] * m for m in shape["channel_mult"]],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "in_channels": 3,
        "latent_channels": shape["latent_channels"],
        "layers_per_block": shape["num_res_blocks"],
        "mid_block_add_attention": shape["mid_attention"],
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": size_px,
        "scaling_factor": latent_scale,
    }
    if codec["name"] == "vq":
        values |= {
            "_class_name": VQ_CLASS,
            "lookup_from_codebook": True,
            "num_vq_embeddings": codec["num_codes"],
            "vq_embed_dim": codec.get("code_dim") or shape["latent_channels"],
        }
    return values
