"""A trained run of t2i, as what can be given to others. What has no foreign form is refused, by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i import families
from t2i.config import check, parse_run, to_dict
from t2i.errors import CheckpointError, ConfigError
from t2i.families.formats import Formats
from t2i.interop import ldm_bert
from t2i.interop.clip import ClipText
from t2i.interop.compvis_in import open_clip_text
from t2i.interop.diffusers_in import read_clip, read_tokenizer
from t2i.interop.ldm_bert import LDMBertConfig, LDMBertText
from t2i.interop.parts import (
    OWN_BUFFERS,
    CodecPart,
    DenoiserPart,
    Parts,
    TransformerPart,
    codec_shapes,
    foreign_forms,
    scale,
    transformer_shapes,
)
from t2i.interop.reading import only_weights, read_pickle, read_safetensors, read_weights
from t2i.interop.weights import Weights, check_floating, fit, in_memory, under
from t2i.training import run_folder, state_folder
from t2i.training.checkpoint import placed
from t2i.weight_file import weights_format


def is_run(path: Path) -> bool:
    """Whether a folder is a run of t2i, or a checkpoint of one."""
    return (path / "config.yaml").is_file() or state_folder.is_complete(path)


def read_run(place: Path, ema: bool, text_model: str | None) -> Parts:
    """The parts of a run folder or a weights file of ours. text_model: in the place of the run's text.model.
    Raises ConfigError where a part has no foreign form, CheckpointError where the file does not fit."""
    path = run_folder.weights_file(place)
    weights, header, notes = _weights(path, ema)
    config = placed(header.get("config"), path.parent)
    extra = header.get("extra")
    if not isinstance(config, dict) or not isinstance(extra, dict):
        raise CheckpointError(f"{path} was not written by t2i: it has no entry 't2i' with config and extra.")
    run, formats = _understood(config, f"family in {path}")
    model = formats.from_run(run["model"])
    if formats.kind == "codec":
        codec = _codec(model, under(weights, formats.prefixes["codec"]), path)
        return Parts("a t2i autoencoder", codec, run=run, notes=notes)
    codec_run, codec_formats = _understood(extra.get("codec"), f"family of the codec in {path}", "codec")
    codec_model = codec_formats.from_run(codec_run["model"])
    codec = _codec(codec_model, under(weights, formats.prefixes["codec"]), path)
    text = _text(model["text"], text_model, under(weights, formats.prefixes["text"]), path)
    parts = Parts("a t2i run", codec, text=text, run=run, notes=notes)
    size_px = run["resolution"]["size_px"]
    if formats.kind == "masked_codes":
        assert isinstance(text, ClipText)
        transformer, sampling = model["transformer"], model["sampling"]
        wanted = transformer_shapes(transformer, codec.config["codec"]["num_codes"], text)
        found = fit(under(weights, formats.prefixes["transformer"]), wanted, path, "transformer")
        parts.transformer = TransformerPart(transformer, found, sampling, size_px)
        return parts
    latent = codec.config["backbone"]["latent_channels"]
    fitted = {"in_channels": latent, "out_channels": latent, "context_dim": text.token_dim}
    denoiser = model["denoiser"] | fitted
    unet = under(weights, formats.prefixes["denoiser"])
    found = fit(unet, formats.shapes(denoiser), path, "UNet")
    prediction, sampling = model["prediction"], model["sampling"]
    parts.denoiser = DenoiserPart(denoiser, found, model["schedule"], prediction, sampling, size_px)
    return parts


def _understood(config: Any, key: str, kind: str | None = None) -> tuple[dict[str, Any], Formats]:
    """The checked configuration of a run (its model's entries under model) and the formats of its family, which are of
    the kind that is asked for. Raises ConfigError."""
    allowed = {name: each for name, each in foreign_forms().items() if kind in (None, each.kind)}
    name: Any = config.get("family") if isinstance(config, dict) else None
    check(name in tuple(allowed), key, name, f"{', '.join(allowed)} (others have no foreign form)")
    return to_dict(parse_run(config, families.get(name).load_config())), allowed[name]


def _weights(path: Path, ema: bool) -> tuple[Weights, dict[str, Any], list[str]]:
    """The weights, what t2i wrote beside them, and what there is to say of the EMA."""
    if path.is_dir():
        found: Any = state_folder.header(path)
        weights, averages = (
            {name: in_memory(value) for name, value in part.items()} for part in state_folder.weights(path)
        )
        return _averaged(weights, averages, ema, found)
    if weights_format(path) == "safetensors":
        weights, metadata = read_safetensors(path)
        try:
            header = json.loads(metadata.get("t2i", "{}"))
        except (ValueError, RecursionError):
            header = {}
        notes = (
            [] if ema else [f"{path.name} holds the final weights only: averaged where the run had an EMA."]
        )
        return weights, header if isinstance(header, dict) else {}, notes
    saved = read_pickle(path)
    weights, averages = (only_weights(saved.get(key) or {}) for key in ("state_dict", "ema"))
    return _averaged(weights, averages, ema, saved.get("t2i"))


def _averaged(
    weights: Weights, averages: Weights, ema: bool, header: Any
) -> tuple[Weights, dict[str, Any], list[str]]:
    notes = [] if averages else ["The run has no EMA: the only weights that there are were taken."]
    return weights | averages if ema else weights, header if isinstance(header, dict) else {}, notes


def _codec(config: dict[str, Any], weights: Weights, path: Path) -> CodecPart:
    saved = weights.get("latent_scale")
    if saved is None or saved.shape:
        raise CheckpointError(f"{path} lacks the codec's latent_scale.")
    check_floating("latent_scale", saved, path)
    published = {name: weight for name, weight in weights.items() if name not in OWN_BUFFERS}
    # The shortest decimal of the stored float32: 0.18215, and not 0.1821500062942505.
    latent_scale = scale(float(str(saved.read().float().numpy())), f"latent_scale in {path}")
    return CodecPart(config, fit(published, codec_shapes(config), path, "autoencoder"), latent_scale)


def _text(
    text: Mapping[str, Any], text_model: str | None, trained: Weights, path: Path
) -> ClipText | LDMBertText:
    """The text encoder: of the run's own weights where it learned with the model; a frozen one has to be in a local
    folder or file."""
    if text["name"] == "ldm_bert":
        config = LDMBertConfig(*(text[key] for key in LDMBertConfig.__dataclass_fields__))
        place = text_model or text["model"]
        tokenizer = read_tokenizer(Path(place), "", ldm_bert.TOKENIZER_FILES) if place else {}
        return LDMBertText(config, fit(trained, ldm_bert.shapes(config), path, "text encoder"), tokenizer)
    projected = text["name"] == "clip_with_projection"
    if text_model is not None or text["name"] == "clip" or projected:
        return _clip_folder(Path(text_model or text["model"] or ""), text["max_tokens"], projected)
    return _open_clip(text)


def _clip_folder(folder: Path, max_tokens: int, projected: bool) -> ClipText:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"text.model {str(folder)!r} is not a local folder with a CLIP text model; give it by --text DIR."
        )
    text = read_clip(folder, "", read_tokenizer(folder, ""), True, [], projected)
    return dataclasses.replace(text, max_tokens=max_tokens)


def _open_clip(text: Mapping[str, Any]) -> ClipText:
    import open_clip

    path = Path(text["weights"] or "")
    if not path.is_file():
        raise CheckpointError(
            f"text.weights is {text['weights']!r}; allowed: a local file of OpenCLIP's weights."
        )
    settings = open_clip.get_model_config(text["model"])
    if settings is None:
        raise ConfigError(
            f"text.model is {text['model']!r}; allowed: an architecture of open_clip.list_models()."
        )
    weights = read_weights(path)
    tower = under(weights, "text.") or {n: w for n, w in weights.items() if not n.startswith("visual.")}
    for name in ("logit_scale", "logit_bias", "text_projection", "attn_mask"):
        tower.pop(name, None)
    act = "quick_gelu" if settings.get("quick_gelu") else "gelu"
    result = open_clip_text(tower, path, True, settings["text_cfg"]["heads"], act)
    return ClipText(result.config, result.weights, result.tokenizer, text["max_tokens"])
