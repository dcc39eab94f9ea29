"""A diffusers directory: Stable Diffusion 1 and 2, LDM text-to-image, or an autoencoder by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i.config import check
from t2i.errors import CheckpointError
from t2i.interop import clip, ldm_bert
from t2i.interop.clip import ClipText, without_prefix
from t2i.interop.diffusers_config import (
    KL_CLASS,
    UNET_CLASS,
    VQ_CLASS,
    read_codec,
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
from t2i.interop.options import Options
from t2i.interop.parts import (
    CodecPart,
    DenoiserPart,
    Parts,
    Text,
    codec_shapes,
    denoiser_shapes,
    lacking,
    masks_of,
)
from t2i.interop.scheduler import ASSUMED_EPS, SAMPLING, SCHEDULE, Scheduler, read_scheduler
from t2i.interop.weights import fit

# The pipelines that are read, and what they call the parts.
PIPELINES = {
    "StableDiffusionPipeline": {"codec": "vae", "text": "text_encoder"},
    "StableDiffusionImg2ImgPipeline": {"codec": "vae", "text": "text_encoder"},
    "StableDiffusionInpaintPipeline": {"codec": "vae", "text": "text_encoder"},
    "LDMTextToImagePipeline": {"codec": "vqvae", "text": "bert"},
}
AMUSED_PIPELINES = ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")  # see amused.py
UNSUPPORTED_PIPELINES = {
    "StableDiffusionDepth2ImgPipeline": "a depth-to-image model",
    "StableDiffusionUpscalePipeline": "a x4 upscaler",
    "StableDiffusionLatentUpscalePipeline": "an upscaler of latents",
    "StableDiffusionInstructPix2PixPipeline": "a model that edits by instruction",
}
STEM = "diffusion_pytorch_model"


def read_pipeline(root: Path, options: Options, codec: CodecPart | None, text: Text | None) -> Parts:
    """The parts of a pipeline's folder, all weights unread. codec, text: in the place of its own, or where it has
    none. Raises ConfigError or CheckpointError."""
    name: Any = "StableDiffusionPipeline"
    if (root / "model_index.json").exists():
        name = read_json(root, "model_index.json").get("_class_name")
        key = f"{root / 'model_index.json'}: _class_name"
        allowed = ", ".join([*PIPELINES, *AMUSED_PIPELINES])
        if name in tuple(UNSUPPORTED_PIPELINES):  # a file may say what has no hash
            raise CheckpointError(
                f"{root} is {UNSUPPORTED_PIPELINES[name]} ({name}), which is not supported; allowed: "
                f"{allowed}."
            )
        check(name in tuple(PIPELINES), key, name, allowed)
    notes: list[str] = []
    places = PIPELINES[name]
    if codec is None:
        if not (root / places["codec"]).is_dir():
            raise lacking(root, f"autoencoder ({places['codec']}/)", "--vae FILE or DIR")
        codec = read_autoencoder(root, places["codec"], options.ema, notes)
    if text is None:
        if not (root / places["text"]).is_dir():
            raise lacking(root, f"text encoder ({places['text']}/)", "--text DIR or FILE")
        text = read_text(root, places["text"], options.ema, notes)
    if not (root / "unet").is_dir():
        raise CheckpointError(f"{root} has no UNet (unet/), which nothing else can stand for.")
    parts = Parts(f"a diffusers directory ({name})", codec, text=text, notes=notes)
    return _with_unet(parts, root, "unet", options, name != "LDMTextToImagePipeline")


def read_unet_alone(root: Path, options: Options, codec: CodecPart | None, text: Text | None) -> Parts:
    """The folder of a UNet by itself, with the other parts from elsewhere."""
    if codec is None:
        raise lacking(root, "autoencoder", "--vae FILE or DIR")
    if text is None:
        raise lacking(root, "text encoder", "--text DIR or FILE")
    parts = Parts("a UNet of diffusers", codec, text=text)
    return _with_unet(parts, root, "", options, True)


def _with_unet(parts: Parts, root: Path, component: str, options: Options, stable_diffusion: bool) -> Parts:
    """Adds the UNet, with the schedule of the pipeline that it is in."""
    codec, text = parts.codec, parts.text
    assert text is not None
    values = read_config(root, component, UNET_CLASS)
    latent = codec.config["backbone"]["latent_channels"]
    masks = masks_of(values.get("in_channels"), latent, root)
    config = read_unet(values, _place(root, component))
    if masks is not None:
        config |= {"in_channels": latent, "masks": masks}
    fitting = {"cross_attention_dim": ("context_dim", text.token_dim)}
    fitting |= {key: (key, latent) for key in ("in_channels", "out_channels")}
    for theirs, (ours, value) in fitting.items():
        allowed = f"{value}, as its other parts have"
        check(config[ours] == value, f"{_place(root, component)}: {theirs}", config[ours], allowed)
    weights, listed_in = component_weights(root, component, STEM, options.ema, parts.notes)
    wanted = denoiser_shapes(config, config["in_channels"], config["context_dim"])
    names = diffusers_unet(wanted, config["num_res_blocks"])
    found = fit(weights, {names[ours]: shape for ours, shape in wanted.items()}, listed_in, "UNet")
    scheduler = _scheduler(parts, root, component, options, stable_diffusion)
    side = values.get("sample_size")
    side = side if type(side) is int and 1 <= side <= 4096 else 64
    parts.denoiser = DenoiserPart(
        config,
        {ours: found[theirs] for ours, theirs in names.items()},
        scheduler.schedule,
        scheduler.prediction,
        scheduler.sampling,
        side * codec.downsampling,
    )
    return parts


def _scheduler(
    parts: Parts, root: Path, component: str, options: Options, stable_diffusion: bool
) -> Scheduler:
    file = "scheduler/scheduler_config.json"
    if component and (root / file).exists():
        values = read_json(root, file)
        if (root / "model_index.json").exists():  # which names the class that a pipeline makes of it
            named = read_json(root, "model_index.json").get("scheduler")
            if isinstance(named, list) and len(named) == 2:
                values = values | {"_class_name": named[1]}
        scheduler = read_scheduler(values, str(root / file), stable_diffusion)
        said = scheduler.prediction
        check(
            options.prediction in (None, said),
            "--prediction",
            options.prediction,
            f"{said}, as {root / file} says",
        )
        parts.notes += scheduler.notes
        return scheduler
    parts.notes.append("There is no scheduler's configuration: Stable Diffusion's noise schedule is assumed.")
    if options.prediction is None:
        parts.notes.append(ASSUMED_EPS)
    return Scheduler(dict(SCHEDULE), options.prediction or "eps", dict(SAMPLING), [])


def read_autoencoder(
    root: Path, component: str, ema: bool, notes: list[str], classes: Sequence[str] = (KL_CLASS, VQ_CLASS)
) -> CodecPart:
    """The codec of a pipeline, or, with component "", one whose folder is `root`."""
    values = read_config(root, component, *classes)
    config, latent_scale = read_codec(values, _place(root, component))
    weights, listed_in = component_weights(root, component, STEM, ema, notes)
    wanted = codec_shapes(config)
    names = diffusers_codec(wanted, len(config["backbone"]["channel_mult"]))
    weights = with_present_attention_names(weights)
    # The published files have attention as matrices or, the older ones, as 1x1 convolutions.
    for ours, theirs in names.items():
        if codec_attention_matrix(ours) and theirs in weights and len(weights[theirs].shape) == 2:
            weights[theirs] = weights[theirs].reshaped(*weights[theirs].shape, 1, 1)
    found = fit(weights, {names[ours]: shape for ours, shape in wanted.items()}, listed_in, "autoencoder")
    return CodecPart(config, {ours: found[theirs] for ours, theirs in names.items()}, latent_scale)


def read_text(root: Path, component: str, ema: bool, notes: list[str]) -> Text:
    """The text encoder with its tokenizer's files: a CLIP text model in transformers' format, or LDM's own."""
    if component == "bert":
        return _read_bert(root, component, ema, notes)
    return read_clip(root, component, read_tokenizer(root, "tokenizer"), ema, notes)


def read_clip(
    root: Path,
    component: str,
    tokenizer: dict[str, bytes] | None,
    ema: bool,
    notes: list[str],
    projected: bool = False,
) -> ClipText:
    """A CLIP text model, or the text half of a CLIP, in transformers' format. tokenizer: its files; None for the
    vocabulary that all published ones have. projected: with the projection to CLIP's embedding."""
    values = read_json(root, f"{component}/config.json" if component else "config.json")
    config = clip.parse_config(values.get("text_config") or values)
    weights, listed_in = component_weights(root, component, "model", ema, notes)
    wanted, bare = clip.shapes(config), without_prefix(weights)
    if projected:
        wanted[clip.PROJECTION] = (config.projection_dim, config.hidden_size)
        bare |= {name: weights[name] for name in (clip.PROJECTION,) if name in weights}
    found = fit(bare, wanted, listed_in, "text encoder")
    projection = found.pop(clip.PROJECTION, None)
    positions = config.max_position_embeddings
    if tokenizer is None:
        tokenizer = clip.tokenizer_files(positions, clip.END if config.hidden_act == "quick_gelu" else "!")
        rows = f"{len(json.loads(tokenizer['vocab.json']))}, as CLIP's vocabulary has, or a tokenizer in the folder"
        check(config.vocab_size == 49408, f"{_place(root, component)}: vocab_size", config.vocab_size, rows)
        notes.append(
            "The text encoder comes without a vocabulary: CLIP's, which comes with open_clip, is used."
        )
    return ClipText(config, found, tokenizer, max_tokens(tokenizer, positions), projection)


def _read_bert(root: Path, component: str, ema: bool, notes: list[str]) -> LDMBertText:
    config = ldm_bert.parse_config(read_json(root, f"{component}/config.json"), _place(root, component))
    weights, listed_in = component_weights(root, component, "model", ema, notes)
    weights = {name: weight for name, weight in weights.items() if not name.startswith("to_logits.")}
    wanted = ldm_bert.shapes(config)
    names = {ours: ldm_bert.diffusers_name(ours) for ours in wanted}
    found = fit(weights, {names[ours]: shape for ours, shape in wanted.items()}, listed_in, "text encoder")
    tokenizer = read_tokenizer(root, "tokenizer", ldm_bert.TOKENIZER_FILES)
    return LDMBertText(config, {ours: found[theirs] for ours, theirs in names.items()}, tokenizer)


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
    if "merges.txt" in names and not {"vocab.json", "merges.txt"} <= files.keys():
        files |= clip.vocabulary_of(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    return files


def max_tokens(tokenizer: Mapping[str, bytes], positions: int) -> int:
    """What the pipeline pads captions to: the tokenizer's own length, if the model has as many positions."""
    length = json.loads(tokenizer.get("tokenizer_config.json", b"{}")).get("model_max_length")
    return length if type(length) is int and 2 <= length <= positions else positions


def read_config(root: Path, component: str, *classes: str) -> dict[str, Any]:
    name = f"{component}/config.json" if component else "config.json"
    values = read_json(root, name)
    found = values.get("_class_name")
    check(found in classes, f"{inside(root, name)}: _class_name", found, " or ".join(classes))
    return values


def _place(root: Path, component: str) -> str:
    return str(root / component / "config.json")
