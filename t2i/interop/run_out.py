"""A run folder of t2i, made of what was converted: `t2i sample --checkpoint` draws from it as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from t2i import families
from t2i.config import (
    DataConfig,
    EMAConfig,
    LoggerConfig,
    ModelConfig,
    OptimizerConfig,
    ResolutionConfig,
    RunConfig,
    TrainerConfig,
    parse_run,
    run_to_dict,
    to_dict,
)
from t2i.interop import clip
from t2i.interop.card import UNKNOWN
from t2i.interop.clip import ClipText
from t2i.interop.ldm_bert import LDMBertText
from t2i.interop.parts import CodecPart, Parts, formats_of
from t2i.interop.weights import Weight, Weights, in_memory, renamed
from t2i.interop.writing import Progress, write_safetensors
from t2i.training import run_folder
from t2i.training.checkpoint import RUN_FOLDER

TEXT_FOLDER, TOKENIZER_FOLDER = "text_encoder", "tokenizer"


def run_values(parts: Parts) -> dict[str, Any]:
    """The configuration of the run. What no foreign file says (data, learning rate, batch size) is Stable
    Diffusion's recipe, to go on from. Raises ConfigError where the parts ask for what a run cannot have."""
    denoiser, transformer, text = parts.denoiser, parts.transformer, parts.text
    entries: dict[str, Any]
    if transformer is not None:
        assert text is not None
        entries = {"transformer": transformer.config, "sampling": transformer.sampling}
        model = formats_of("masked_codes").to_run(entries | {"text": text_values(text)})
    elif denoiser is None:
        model = formats_of("codec").to_run(parts.codec.config)
    else:
        assert text is not None
        entries = {
            "denoiser": denoiser.config,
            "schedule": denoiser.schedule,
            "prediction": denoiser.prediction,
            "text": text_values(text),
            "sampling": denoiser.sampling,
        }
        model = formats_of("text_to_image").to_run(entries)
    values = shared_values(parts.size_px) | model
    return run_to_dict(parse_run(values, families.get(values["family"]).load_config()))


def text_values(text: ClipText | LDMBertText) -> dict[str, Any]:
    """The entry text. A frozen encoder lies in the run folder; of one that learns with the model only the
    tokenizer does."""
    values: dict[str, Any] = {"name": "clip", "model": f"{RUN_FOLDER}/{TEXT_FOLDER}"}
    if isinstance(text, ClipText) and text.projection is not None:
        values["name"] = "clip_with_projection"
    if isinstance(text, LDMBertText):
        folder = f"{RUN_FOLDER}/{TOKENIZER_FOLDER}" if text.tokenizer else None
        values = {"name": "ldm_bert", "model": folder, **vars(text.config)}
    return values | {"max_tokens": text.max_tokens}


def shared_values(size_px: int) -> dict[str, Any]:
    """The entries that every stage has."""
    config = RunConfig(
        stage="",
        family="",
        name=None,
        runs_dir="runs",
        seed=0,
        init_from=None,
        resume=None,
        data=DataConfig(
            source=None,
            shards=UNKNOWN,
            caption_keys=["txt", "json:caption"],
            filter_by_size=True,
            num_workers=0,
            cache_mib=0,
        ),
        resolution=ResolutionConfig(
            size_px=size_px,
            min_original_px=size_px,
            text_dropout=0.1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_images=0),
        ema=EMAConfig(half_life_images=14_195_000, rampup_ratio=None),
        trainer=TrainerConfig(num_images=1, batch_size=8, precision="32-true"),
        logger=LoggerConfig(wandb="off"),
        model=ModelConfig(),
    )
    values = to_dict(config)
    del values["model"]
    return values


def write_run(parts: Parts, folder: Path, dtype: torch.dtype, progress: Progress) -> None:
    """config.yaml, model.safetensors and text_encoder/."""
    values = run_values(parts)
    extra = {}
    if not parts.is_codec:
        alone = Parts(parts.kind, parts.codec)
        extra = {"codec": run_values(alone)}
    folder.mkdir(parents=True)
    run_folder.write_config(folder, values)
    header = {"t2i": json.dumps({"config": run_folder.as_saved(values), "extra": run_folder.as_saved(extra)})}
    write_safetensors(folder / run_folder.FINAL_WEIGHTS, _weights(parts), dtype, header, progress)
    if isinstance(parts.text, ClipText):
        write_clip(parts.text, folder / TEXT_FOLDER, dtype, progress)
    elif parts.text is not None:
        write_files(folder / TOKENIZER_FOLDER, parts.text.tokenizer)


def write_clip(
    text: ClipText, folder: Path, dtype: torch.dtype, progress: Progress, tokenizer: bool = True
) -> None:
    """transformers' folder of a CLIP text model, which old and new versions read."""
    write_safetensors(folder / "model.safetensors", text.saved_weights, dtype, {"format": "pt"}, progress)
    (folder / "config.json").write_text(json.dumps(clip.config_json(text), indent=2) + "\n")
    if tokenizer:
        write_files(folder, clip.with_max_tokens(text.tokenizer, text.max_tokens))


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Small files by name; no folder where there are none."""
    for name, data in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _weights(parts: Parts) -> Weights:
    codec = codec_weights(parts.codec)
    if parts.transformer is not None:
        prefixes = formats_of("masked_codes").prefixes
        transformer = renamed(parts.transformer.weights, prefixes["transformer"])
        return renamed(codec, prefixes["codec"]) | transformer
    if parts.denoiser is None:
        return renamed(codec, formats_of("codec").prefixes["codec"])
    prefixes = formats_of("text_to_image").prefixes
    weights = renamed(codec, prefixes["codec"]) | renamed(parts.denoiser.weights, prefixes["denoiser"])
    if isinstance(parts.text, LDMBertText):
        weights |= renamed(parts.text.weights, prefixes["text"])
    return weights


def codec_weights(codec: CodecPart) -> Weights:
    """The codec's whole state: its weights, and the buffers that only we have."""
    weights = codec.weights | {"latent_scale": in_memory(torch.tensor(codec.latent_scale))}
    if codec.quantised:
        codes = codec.weights["codebook.codes"]
        sums = codes
        if codec.config["codec"].get("normalize", False):  # whose averages are those of vectors of length 1
            sums = Weight(codes.shape, torch.float64, lambda: F.normalize(codes.read().double()))
        # As if every code had been used alike: none is dead, and further training begins from these codes.
        weights |= {
            "codebook.cluster_size": in_memory(torch.ones(codes.shape[0])),
            "codebook.cluster_sum": sums,
            "codebook.steps": in_memory(torch.zeros((), dtype=torch.int64)),
        }
    return weights
