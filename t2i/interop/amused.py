"""A diffusers directory of aMUSEd (2401.01808), in and out. Its transformer's weights have the same names here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i.config import check
from t2i.interop.clip import ClipText
from t2i.interop.diffusers_config import VQ_CLASS, check_fixed
from t2i.interop.diffusers_in import (
    AMUSED_PIPELINES,
    STEM,
    read_autoencoder,
    read_clip,
    read_config,
    read_tokenizer,
)
from t2i.interop.folder import component_weights, read_json
from t2i.interop.options import Options
from t2i.interop.parts import CodecPart, Parts, TransformerPart, bounded, is_one_of, transformer_shapes
from t2i.interop.weights import fit

TRANSFORMER_CLASS = "UVit2DModel"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
STEPS = 12
# What AmusedPipeline draws with unless it is told otherwise. Its noise on the confidence falls from 2 at the first step
# to 0 at the last; see `t2i.codes.masked.decode`.
SAMPLING: dict[str, Any] = {
    "steps": STEPS,
    "guidance_scale": 10.0,
    "guidance_schedule": "constant",
    "temperature": 1.0,
    "top_k": None,
    "top_p": 1.0,
    "choice_temperature": 2 * STEPS / (STEPS - 1),
    "order": "confidence",
    "noise_per": "code",
}
# Entries that have one value in our transformer; the first is diffusers' default.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0,),
    "layer_norm_eps": (1e-6,),
    "ln_elementwise_affine": (True,),
    "micro_cond_embed_dim": (1280,),
    "micro_cond_encode_dim": (256,),
    "use_bias": (False,),
}
# Our names of the sizes, diffusers' names, their defaults and the most that is read.
SIZES = {
    "width": ("hidden_size", 1024, 16_384),
    "depth": ("num_hidden_layers", 22, 256),
    "heads": ("num_attention_heads", 16, 256),
    "hidden": ("intermediate_size", 2816, 65_536),
    "channels": ("block_out_channels", 768, 16_384),
    "conv_blocks": ("num_res_blocks", 3, 64),
    "conv_heads": ("block_num_heads", 12, 256),
    "embedding_dim": ("in_channels", 768, 16_384),
    "vocabulary": ("vocab_size", 8256, 2**24),
}


def is_amused(folder: Path) -> bool:
    """Whether a folder says that it is aMUSEd's pipeline."""
    if not (folder / "model_index.json").exists():
        return False
    return read_json(folder, "model_index.json").get("_class_name") in AMUSED_PIPELINES


def read_amused(root: Path, options: Options) -> Parts:
    """The parts of a pipeline's folder, all weights unread. Raises ConfigError or CheckpointError."""
    notes: list[str] = []
    codec = read_autoencoder(root, "vqvae", options.ema, notes, [VQ_CLASS])
    codec.config["backbone"]["unit_range"] = True  # AmusedPipeline gives what it decodes as it is
    place = f"{root / 'transformer/config.json'}: "
    values = read_config(root, "transformer", TRANSFORMER_CLASS)
    config = read_transformer(values, place)
    num_codes = codec.config["codec"]["num_codes"]
    check(config["vocabulary"] > num_codes, f"{place}vocab_size", config["vocabulary"], f"over {num_codes:,}")
    _check_scheduler(root, config["vocabulary"] - 1)
    tokenizer = read_tokenizer(root, "tokenizer")
    text = read_clip(root, "text_encoder", tokenizer, options.ema, notes, projected=True)
    others = {
        "codebook_size": (8192, num_codes),
        "cond_embed_dim": (768, text.pooled_dim),
        "encoder_hidden_size": (768, text.token_dim),
    }
    for key, (default, value) in others.items():
        found = values.get(key, default)
        check(is_one_of(found, [value]), place + key, found, f"{value}, as its other parts have")
    weights, listed_in = component_weights(root, "transformer", STEM, options.ema, notes)
    found_weights = fit(weights, transformer_shapes(config, num_codes, text), listed_in, "transformer")
    size_px = bounded(values.get("sample_size", 64), f"{place}sample_size", 4096) * codec.downsampling
    parts = Parts("a diffusers directory (aMUSEd)", codec, text=text, notes=notes)
    parts.transformer = TransformerPart(config, found_weights, dict(SAMPLING), size_px)
    notes.append(
        f"It is drawn from as AmusedPipeline does unless told otherwise: {STEPS} steps, guidance "
        f"{SAMPLING['guidance_scale']:g}. With sampling.steps=N, sampling.choice_temperature should be 2 N / (N - 1). "
        "sampling.noise_per=position draws other pictures for a seed, with fewer random numbers."
    )
    return parts


def read_transformer(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """UVit2DModel's configuration -> the entry transformer. Raises ConfigError."""
    check_fixed(values, FIXED, place.removesuffix(": "))
    config = {
        ours: bounded(values.get(theirs, default), place + theirs, most)
        for ours, (theirs, default, most) in SIZES.items()
    }
    down, up = (values.get(key, False) for key in ("downsample", "upsample"))
    check(type(down) is bool, f"{place}downsample", down, "true or false")
    check(up == down, f"{place}upsample", up, f"{down}, as downsample is")
    dropout = values.get("hidden_dropout", 0.0)
    ok = type(dropout) in (int, float) and 0 <= dropout < 1
    check(ok, f"{place}hidden_dropout", dropout, "0 up to, not including, 1")
    return {"name": "uvit", **config, "downsample": down, "dropout": float(dropout)}


def _check_scheduler(root: Path, mask_token: int) -> None:
    """Raises ConfigError where the codes are drawn by other rules than ours."""
    values = read_json(root, SCHEDULER_FILE)
    wanted = {"_class_name": "AmusedScheduler", "mask_token_id": mask_token, "masking_schedule": "cosine"}
    for key, value in wanted.items():
        found = values.get(key, "cosine" if key == "masking_schedule" else None)
        words = f"{value}, the last row of the table of codes" if key == "mask_token_id" else str(value)
        check(is_one_of(found, [value]), f"{root / SCHEDULER_FILE}: {key}", found, words)


def check_writable(codec: CodecPart) -> None:
    """Raises ConfigError where AmusedPipeline would draw other pictures with this codec."""
    shape, dim = codec.config["backbone"], codec.config["codec"].get("code_dim")
    unit_range, latent = shape.get("unit_range", False), shape["latent_channels"]
    check(unit_range, "backbone.unit_range", unit_range, "true in an AmusedPipeline")
    ok = dim in (None, latent)
    check(ok, "codec.code_dim", dim, f"{latent} in an AmusedPipeline, as backbone.latent_channels")


def amused_files(parts: Parts) -> dict[str, dict[str, Any]]:
    """The JSON files of the pipeline's folder but those of text encoder and codec. Raises ConfigError."""
    check_writable(parts.codec)
    transformer, text, codec = parts.transformer, parts.text, parts.codec
    assert transformer is not None
    assert isinstance(text, ClipText)
    num_codes = codec.config["codec"]["num_codes"]
    vocabulary = transformer.config["vocabulary"] or num_codes + 1
    config = transformer.config | {"vocabulary": vocabulary}
    return {
        "model_index.json": {
            "_class_name": AMUSED_PIPELINES[0],
            "_diffusers_version": "0.26.0",
            "scheduler": ["diffusers", "AmusedScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "transformer": ["diffusers", TRANSFORMER_CLASS],
            "vqvae": ["diffusers", VQ_CLASS],
        },
        SCHEDULER_FILE: {
            "_class_name": "AmusedScheduler",
            "mask_token_id": vocabulary - 1,
            "masking_schedule": "cosine",
        },
        "transformer/config.json": {
            "_class_name": TRANSFORMER_CLASS,
            **{key: allowed[0] for key, allowed in FIXED.items()},
            **{theirs: config[ours] for ours, (theirs, _, _) in SIZES.items()},
            "codebook_size": num_codes,
            "cond_embed_dim": text.pooled_dim,
            "encoder_hidden_size": text.token_dim,
            "downsample": config["downsample"],
            "upsample": config["downsample"],
            "hidden_dropout": config["dropout"],
            "sample_size": transformer.size_px // codec.downsampling,
        },
    }
