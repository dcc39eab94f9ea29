"""A diffusers directory: Stable Diffusion 1 and 2, LDM text-to-image, or an autoencoder by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i.config import check
from t2i.errors import CheckpointError
from t2i.interop import clip, ldm_bert
from t2i.interop.clip import ClipText
from t2i.interop.diffusers_config import (
    KL_CLASS,
    UNET_CLASS,
    VQ_CLASS,
    read_codec,
    read_scheduler,
    read_unet,
)
from t2i.interop.folder import component_weights, inside, read_bytes, read_json
from t2i.interop.ldm_bert import LDMBertText
from t2i.interop.names import (
    codec_attention_matrix,
    diffusers_codec,
    diffusers_unet,
    with_present_attention_names,
)
from t2i.interop.parts import CodecPart, DenoiserPart, Parts, codec_shapes, denoiser_shapes
from t2i.interop.weights import Weights, fit

# The pipelines that are read, and what they call the parts.
PIPELINES = {
    "StableDiffusionPipeline": {"codec": "vae", "text": "text_encoder"},
    "StableDiffusionImg2ImgPipeline": {"codec": "vae", "text": "text_encoder"},
    "LDMTextToImagePipeline": {"codec": "vqvae", "text": "bert"},
}
STEM = "diffusion_pytorch_model"


def read_pipeline(root: Path) -> Parts:
    """The parts of a pipeline's folder, all weights unread. Raises ConfigError or CheckpointError."""
    name = read_json(root, "model_index.json").get("_class_name")
    check(name in tuple(PIPELINES), f"{root / 'model_index.json'}: _class_name", name, ", ".join(PIPELINES))
    assert isinstance(name, str)
    parts = Parts(f"a diffusers directory ({name})", read_autoencoder(root, PIPELINES[name]["codec"]))
    text = read_text(root, PIPELINES[name]["text"])
    values = _config(root, "unet", UNET_CLASS)
    config = read_unet(values, _place(root, "unet"))
    latent = parts.codec.config["backbone"]["latent_channels"]
    fitting = {"cross_attention_dim": ("context_dim", text.token_dim)}
    fitting |= {key: (key, latent) for key in ("in_channels", "out_channels")}
    for theirs, (ours, value) in fitting.items():
        allowed = f"{value}, as its other parts have"
        check(config[ours] == value, f"{_place(root, 'unet')}: {theirs}", config[ours], allowed)
    weights, listed_in = component_weights(root, "unet", STEM)
    wanted = denoiser_shapes(config, config["in_channels"], config["context_dim"])
    names = diffusers_unet(wanted, config["num_res_blocks"])
    found = fit(weights, {names[ours]: shape for ours, shape in wanted.items()}, listed_in, "UNet")
    schedule, prediction = read_scheduler(
        read_json(root, "scheduler/scheduler_config.json"), str(root / "scheduler/scheduler_config.json")
    )
    side = values.get("sample_size")
    side = side if type(side) is int and 1 <= side <= 4096 else 64
    parts.text = text
    parts.denoiser = DenoiserPart(
        config,
        {ours: found[theirs] for ours, theirs in names.items()},
        schedule,
        prediction,
        side * parts.codec.downsampling,
    )
    return parts


def read_autoencoder(root: Path, component: str = "") -> CodecPart:
    """The codec of a pipeline, or one whose folder is `root`."""
    values = _config(root, component, KL_CLASS, VQ_CLASS)
    config, latent_scale = read_codec(values, _place(root, component))
    weights, listed_in = component_weights(root, component, STEM)
    wanted = codec_shapes(config)
    names = diffusers_codec(wanted, len(config["backbone"]["channel_mult"]))
    weights = with_present_attention_names(weights)
    # The published files have attention as matrices or, the older ones, as 1x1 convolutions.
    for ours, theirs in names.items():
        if codec_attention_matrix(ours) and theirs in weights and len(weights[theirs].shape) == 2:
            weights[theirs] = weights[theirs].reshaped(*weights[theirs].shape, 1, 1)
    found = fit(weights, {names[ours]: shape for ours, shape in wanted.items()}, listed_in, "autoencoder")
    return CodecPart(config, {ours: found[theirs] for ours, theirs in names.items()}, latent_scale)


def read_text(root: Path, component: str) -> ClipText | LDMBertText:
    """The text encoder with its tokenizer's files: a CLIP text model in transformers' format, or LDM's own."""
    if component == "bert":
        return _read_bert(root, component)
    config = clip.parse_config(read_json(root, f"{component}/config.json"))
    weights, listed_in = component_weights(root, component, "model")
    found = fit(without_prefix(weights), clip.shapes(config), listed_in, "text encoder")
    tokenizer = read_tokenizer(root, "tokenizer")
    return ClipText(config, found, tokenizer, max_tokens(root, tokenizer, config.max_position_embeddings))


def _read_bert(root: Path, component: str) -> LDMBertText:
    config = ldm_bert.parse_config(read_json(root, f"{component}/config.json"), _place(root, component))
    weights, listed_in = component_weights(root, component, "model")
    weights = {name: weight for name, weight in weights.items() if not name.startswith("to_logits.")}
    wanted = ldm_bert.shapes(config)
    names = {ours: ldm_bert.diffusers_name(ours) for ours in wanted}
    found = fit(weights, {names[ours]: shape for ours, shape in wanted.items()}, listed_in, "text encoder")
    tokenizer = read_tokenizer(root, "tokenizer", ldm_bert.TOKENIZER_FILES)
    return LDMBertText(config, {ours: found[theirs] for ours, theirs in names.items()}, tokenizer)


def without_prefix(weights: Weights) -> Weights:
    """transformers' text weights by their bare names; position_ids, which older versions saved, left out."""
    bare = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    return {name: weight for name, weight in bare.items() if not name.endswith("position_ids")}


def read_tokenizer(
    root: Path, component: str, names: Sequence[str] = clip.TOKENIZER_FILES
) -> dict[str, bytes]:
    """Those of the files `names` that are there; what is called JSON has to be JSON."""
    files = {}
    for name in names:
        path = f"{component}/{name}" if component else name
        if (root / path).exists():
            if name.endswith(".json"):
                read_json(root, path)
            files[name] = read_bytes(root, path)
    if not {"vocab.json", "vocab.txt", "tokenizer.json"} & files.keys():
        raise CheckpointError(f"{root / component} has no vocabulary; allowed: {', '.join(names)}.")
    return files


def max_tokens(root: Path, tokenizer: Mapping[str, bytes], positions: int) -> int:
    """What the pipeline pads captions to: the tokenizer's own length, if the model has as many positions."""
    length = json.loads(tokenizer.get("tokenizer_config.json", b"{}")).get("model_max_length")
    return length if type(length) is int and 2 <= length <= positions else positions


def _config(root: Path, component: str, *classes: str) -> dict[str, Any]:
    name = f"{component}/config.json" if component else "config.json"
    values = read_json(root, name)
    found = values.get("_class_name")
    check(found in classes, f"{inside(root, name)}: _class_name", found, " or ".join(classes))
    return values


def _place(root: Path, component: str) -> str:
    return str(root / component / "config.json")
