"""What a source is, and the parts that the command line names in the place of the source's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from t2i.config import check
from t2i.errors import CheckpointError
from t2i.interop.amused import is_amused, read_amused
from t2i.interop.codec_form import check_codec
from t2i.interop.compvis_in import LATENT_SCALE, UNET, is_text_encoder, read_single_file, read_text_weights
from t2i.interop.dalle_in import is_dalle, read_dalle
from t2i.interop.diffusers_config import UNET_CLASS
from t2i.interop.diffusers_in import (
    PIPELINES,
    read_autoencoder,
    read_clip,
    read_pipeline,
    read_text,
    read_tokenizer,
    read_unet_alone,
)
from t2i.interop.folder import read_json
from t2i.interop.options import Options
from t2i.interop.parts import CodecPart, Parts, Text
from t2i.interop.reading import read_named
from t2i.interop.run_in import is_run, read_run


def read(source: Path, options: Options) -> tuple[Parts, bool]:
    """The parts of whatever `source` is, and whether t2i made it."""
    if not source.exists():
        raise CheckpointError(
            f"{source} does not exist; give a diffusers folder, a checkpoint file or a t2i run."
        )
    if is_run(source):
        return _run(source, options), True
    if source.is_dir():
        notes: list[str] = []
        kind = _class_name(source)
        if is_amused(source):
            parts = read_amused(source, options)
        elif (source / "model_index.json").exists() or (source / "unet").is_dir():
            parts = read_pipeline(source, options, *_given(options, notes))
        elif kind == UNET_CLASS:
            parts = read_unet_alone(source, options, *_given(options, notes))
        elif is_dalle(source):
            parts = read_dalle(source)
        elif kind is not None:
            parts = Parts("a diffusers autoencoder", _autoencoder(source, options, notes))
        else:
            raise CheckpointError(
                f"{source} is none of: a diffusers folder (model_index.json), a t2i run (config.yaml), the folder of "
                "an autoencoder or of a UNet (config.json), the folder of DALL-E's encoder.pt and decoder.pt."
            )
    else:
        weights, metadata, is_ours = read_named(source)
        if is_ours:
            return _run(source, options), True
        notes = []
        parts = read_single_file(source, weights, metadata, options, *_given(options, notes))
    parts.notes += notes
    given = {"--vae": options.vae, "--text": options.text_model, "--prediction": options.prediction}
    for flag, value in given.items():
        check(value is None or parts.denoiser is not None, flag, value, "only with a source that has a UNet")
    return parts, False


def _autoencoder(source: Path, options: Options, notes: list[str]) -> CodecPart:
    codec = read_autoencoder(source, "", options.ema, notes)
    if codec.quantised:
        codec.config["backbone"]["unit_range"] = is_amused(source.resolve().parent)
        if not codec.config["backbone"]["unit_range"]:
            notes.append(
                "Its pictures are taken to be in [-1, 1]; those of aMUSEd's, which are in [0, 1], are known by the "
                "model_index.json beside its folder."
            )
    return codec


def _run(source: Path, options: Options) -> Parts:
    for flag, value in {"--vae": options.vae, "--prediction": options.prediction}.items():
        check(value is None, flag, value, "only with a source that t2i did not make")
    parts = read_run(source, options.ema, options.text_model)
    ok = options.text_model is None or parts.text is not None
    check(ok, "--text", options.text_model, "only with a source that has a text encoder")
    return parts


def _class_name(folder: Path) -> object:
    return read_json(folder, "config.json").get("_class_name") if (folder / "config.json").exists() else None


def _given(options: Options, notes: list[str]) -> tuple[CodecPart | None, Text | None]:
    codec = None if options.vae is None else _given_codec(Path(options.vae), options, notes)
    text = None if options.text_model is None else _given_text(Path(options.text_model), options, notes)
    return codec, text


def _given_codec(source: Path, options: Options, notes: list[str]) -> CodecPart:
    """The autoencoder of a file or folder, which may hold more."""
    parts, is_ours = read(source, Options(ema=options.ema))
    check_codec(parts, "a pipeline")
    if parts.denoiser is None and not is_ours and source.is_file() and not parts.codec.quantised:
        notes.append(
            f"{source} does not say how its latents are scaled: by {LATENT_SCALE}, as Stable Diffusion's."
        )
        return dataclasses.replace(parts.codec, latent_scale=LATENT_SCALE)
    return parts.codec


def _given_text(source: Path, options: Options, notes: list[str]) -> Text:
    """The text encoder of a file or folder, which may hold more."""
    if not source.exists():
        raise CheckpointError(f"--text {source} does not exist; give a CLIP text model's folder or file.")
    if source.is_file():
        weights, _, is_ours = read_named(source)
        if not is_ours and (is_text_encoder(weights) or not any(name.startswith(UNET) for name in weights)):
            return read_text_weights(weights, source)
    elif (source / "model_index.json").exists():
        kind = read_json(source, "model_index.json").get("_class_name")
        check(
            kind in tuple(PIPELINES),
            f"{source / 'model_index.json'}: _class_name",
            kind,
            ", ".join(PIPELINES),
        )
        return read_text(source, PIPELINES[str(kind)]["text"], options.ema, notes)
    elif (source / "config.json").exists():
        for root, folder in ((source, ""), (source.parent, "tokenizer")):
            if any((root / folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
                return read_clip(source, "", read_tokenizer(root, folder), options.ema, notes)
        return read_clip(source, "", None, options.ema, notes)
    text = read(source, Options(ema=options.ema))[0].text
    if text is None:
        raise CheckpointError(f"--text {source} holds no text encoder.")
    return text
