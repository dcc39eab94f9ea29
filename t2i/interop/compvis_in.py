"""Single files of CompVis and Stability (Stable Diffusion 1 and 2, LDM), and autoencoders of taming-transformers.

They come without a configuration: the architecture is read from the names and shapes of the weights, and what
these do not tell is assumed as published, and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from t2i.config import check
from t2i.diffusion.config import BetaName
from t2i.diffusion.schedules import betas, zero_terminal_snr
from t2i.errors import CheckpointError
from t2i.few import plural
from t2i.interop import clip, ldm_bert
from t2i.interop.clip import ClipText, without_prefix
from t2i.interop.compvis_shapes import infer_codec, infer_unet
from t2i.interop.gumbel import gumbel_weights, is_gumbel
from t2i.interop.ldm_bert import LDMBertText
from t2i.interop.names import averaged, compvis_codec
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
    scale,
)
from t2i.interop.scheduler import ASSUMED_EPS, SAMPLING, SCHEDULE
from t2i.interop.vitvq import is_vitvq, read_vitvq
from t2i.interop.weights import Weight, Weights, check_floating, fit, renamed, under

UNET, CODEC, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLIP, OPEN_CLIP, BERT = "cond_stage_model.transformer.", "cond_stage_model.model.", "cond_stage_model."

# Entries beside the weights that drawing needs: tables of the schedule, counters, losses, and what the text
# models have beyond the states that are conditioned on.
HARMLESS = re.compile(
    r"(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_alphas_cumprod|betas|lvlb_weights|logvar"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|scale_factor|global_step"
    r"|model_ema\..*|(first_stage_model\.)?loss\..*"
    r"|cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids"
    r"|cond_stage_model\.transformer\.to_logits\.(weight|bias)"
    r"|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)"
)

LATENT_SCALE = 0.18215


def read_single_file(
    path: Path,
    weights: Weights,
    metadata: dict[str, str],
    options: Options,
    codec: CodecPart | None,
    text: Text | None,
) -> Parts:
    """The parts of a model, all weights unread.

    metadata: the text in a safetensors file's header
    options: the prediction None takes what the header says, or else eps, with a note
    codec, text: in the place of the file's own, or where it has none
    """
    if "input_blocks.0.0.weight" in weights:  # a UNet by itself, as some tools save it
        weights = renamed(weights, UNET)
    if any(name.startswith(UNET) for name in weights):
        return _latent_diffusion(path, weights, metadata, options, codec, text)
    if "encoder.conv_in.weight" in weights:
        return _autoencoder(path, weights, options.ema)
    if is_vitvq(weights):
        return _vitvq(path, weights)
    if "transformer.tok_emb.weight" in weights:
        return _first_stage(path, weights, options.ema)
    first = ", ".join(sorted(weights)[:3]) or "nothing"
    if "conv_in.weight" in weights or "encoder.down_blocks.0.resnets.0.conv1.weight" in weights:
        raise CheckpointError(
            f"{path} holds weights under diffusers' names ({first}, ...), which do not tell the model's shape; give "
            "the folder in which its config.json lies."
        )
    if "blocks.input.w" in weights or "blocks.input.weight" in weights:
        raise CheckpointError(
            f"{path} is one half of DALL-E's discrete VAE; give the folder that holds encoder.pt and decoder.pt."
        )
    if is_text_encoder(weights):
        raise CheckpointError(
            f"{path} holds a text encoder alone; give it by --text, with a UNet as the source."
        )
    raise CheckpointError(
        f"{path} holds {plural(len(weights), 'weight')} ({first}, ...) of no model that is known; allowed: Stable "
        "Diffusion 1 or 2, LDM text-to-image (model.diffusion_model.*), or an autoencoder of LDM or taming (encoder.*)."
    )


def _latent_diffusion(
    path: Path,
    weights: Weights,
    metadata: dict[str, str],
    options: Options,
    codec: CodecPart | None,
    text: Text | None,
) -> Parts:
    if codec is None:
        if not any(name.startswith(CODEC) for name in weights):
            raise lacking(path, f"autoencoder ({CODEC}*)", "--vae FILE or DIR")
        codec = _codec(under(weights, CODEC), path, LATENT_SCALE)
        if (saved := weights.get("scale_factor")) is not None and not saved.shape:
            check_floating("scale_factor", saved, path)
            codec.latent_scale = scale(nearby(saved, LATENT_SCALE), f"scale_factor in {path}")
    parts = Parts("a single file with CompVis' names", codec)
    unet = _chosen(under(weights, UNET), weights, "diffusion_model.", options.ema, parts)
    if text is None:
        if not any(name.startswith(TEXT) for name in weights):
            raise lacking(path, f"text encoder ({TEXT}*)", "--text DIR or FILE")
        text = read_text_weights(weights, path)
    config = infer_unet(unet, path)
    latent = parts.codec.config["backbone"]["latent_channels"]
    masks = masks_of(config["in_channels"], latent, path)
    width = config["context_dim"]
    allowed = f"{text.token_dim}, as its text encoder has"
    check(width == text.token_dim, f"the width of the text that the UNet in {path} takes", width, allowed)
    if masks is not None:
        config["masks"] = masks
    config |= {"in_channels": latent, "out_channels": latent, "context_dim": text.token_dim}
    found = fit(unet, denoiser_shapes(config, latent, text.token_dim), path, "UNet")
    _check_all_known(
        path,
        weights,
        [*(UNET + n for n in unet), *(n for n in weights if n.startswith((CODEC, TEXT)))],
        parts,
    )
    prediction: str | None = options.prediction
    if prediction is None:
        prediction = {"epsilon": "eps", "v": "v"}.get(metadata.get("modelspec.prediction_type", ""))
    if prediction is None:
        prediction = "eps"
        parts.notes.append(ASSUMED_EPS)
    size_px = 256 if isinstance(text, LDMBertText) else 768 if prediction == "v" else 512
    if match := re.fullmatch(r"(\d{2,4})x\1", metadata.get("modelspec.resolution", "")):
        size_px = int(match[1])
    schedule = read_schedule(weights, path)
    parts.denoiser = DenoiserPart(config, found, schedule, prediction, dict(SAMPLING), size_px)
    if isinstance(text, LDMBertText) and not text.tokenizer:
        parts.notes.append("BERT's vocabulary is not in the file: the same one in MiniLM's package is used.")
    parts.text = text
    return parts


def _autoencoder(path: Path, weights: Weights, ema: bool) -> Parts:
    own = {n: w for n, w in weights.items() if not HARMLESS.fullmatch(n)}
    parts = Parts("an autoencoder of LDM or taming-transformers", _codec(own, path, 1.0))
    chosen = _chosen(own, weights, "", ema, parts)
    if chosen is not own:
        parts.codec = _codec(chosen, path, 1.0)
    _check_all_known(path, weights, own, parts)
    if parts.codec.config["codec"]["name"] == "kl":
        parts.notes.append("The file does not say how its latents are scaled: they are left as they are.")
    return parts


def _first_stage(path: Path, weights: Weights, ema: bool) -> Parts:
    """The VQGAN of taming's Net2NetTransformer, which has a counterpart; the transformer has none."""
    condition = (
        "another picture" if any(name.startswith(TEXT) for name in weights) else "a class, or for nothing"
    )
    what = f"a Net2NetTransformer of taming-transformers, which draws codes for {condition}, not for a text"
    own = under(weights, CODEC)
    if not own:
        raise CheckpointError(
            f"{path} is {what}: it has no counterpart here, and no VQGAN ({CODEC}*) to take."
        )
    parts = _autoencoder(path, own, ema)
    parts.notes.append(f"It is {what}: only its VQGAN was taken.")
    return parts


def _vitvq(path: Path, weights: Weights) -> Parts:
    own = {n: w for n, w in weights.items() if not HARMLESS.fullmatch(n)}
    parts = Parts("a ViT-VQGAN of enhancing-transformers", read_vitvq(own, path))
    _check_all_known(path, weights, own, parts)
    return parts


def _chosen(raw: Weights, weights: Weights, prefix: str, ema: bool, parts: Parts) -> Weights:
    """The averages of the weights `raw`, or they themselves. prefix: what is before their names in the averages."""
    counterparts = {name: averaged(prefix + name) for name in raw}
    present = [name for name, theirs in counterparts.items() if theirs in weights]
    if not present:
        if ema:
            parts.notes.append("The file has no EMA weights: the only ones that there are were taken.")
        return raw
    parts.notes.append("EMA weights were taken." if ema else "The weights without EMA were taken.")
    if not ema:
        return raw
    return {name: weights[theirs] for name, theirs in counterparts.items() if theirs in weights}


def _codec(weights: Weights, path: Path, latent_scale: float) -> CodecPart:
    weights = {n: w for n, w in weights.items() if not n.startswith("loss.")}
    config = infer_codec(weights, path)
    if is_gumbel(weights):
        return CodecPart(config, gumbel_weights(config, weights, path), latent_scale)
    wanted = codec_shapes(config)
    names = compvis_codec(wanted)
    found = fit(weights, {names[ours]: shape for ours, shape in wanted.items()}, path, "autoencoder")
    return CodecPart(config, {ours: found[theirs] for ours, theirs in names.items()}, latent_scale)


def is_text_encoder(weights: Weights) -> bool:
    """Whether a file holds a CLIP's text model by itself, as some tools save it."""
    name = "embeddings.token_embedding.weight"
    return name in weights or f"text_model.{name}" in weights


def read_text_weights(weights: Weights, path: Path) -> Text:
    """The text encoder of a file, by the names that it has in Stable Diffusion's, or of a CLIP by itself."""
    if is_text_encoder(weights):
        weights = renamed(weights, CLIP)
    kept = {n: w for n, w in weights.items() if not HARMLESS.fullmatch(n)}
    if OPEN_CLIP + "token_embedding.weight" in kept:
        # Tools that write Stable Diffusion 2 out of diffusers' folder have neither projection nor last layer.
        whole_tower = OPEN_CLIP + "text_projection" in weights
        return open_clip_text(under(kept, OPEN_CLIP), path, whole_tower)
    if BERT + "transformer.token_emb.weight" in kept:
        bert = under(kept, BERT)
        shape = ldm_bert.infer_config(bert, path)
        return LDMBertText(shape, fit(bert, ldm_bert.shapes(shape), path, "text encoder"), {})
    bare = without_prefix(under(kept, CLIP))
    values = clip.infer_config(bare)
    if not values:
        raise CheckpointError(
            f"{path} has no text encoder that is known; allowed: CLIP ({CLIP}*), OpenCLIP ({OPEN_CLIP}*), or "
            f"LDM's transformer ({BERT}transformer.token_emb.weight)."
        )
    config = clip.parse_config(values)
    found = fit(bare, clip.shapes(config), path, "text encoder")
    length = config.max_position_embeddings
    return ClipText(config, found, clip.tokenizer_files(length), length)


def open_clip_text(
    weights: Weights, path: Path, whole_tower: bool, heads: int | None = None, act: str = "gelu"
) -> ClipText:
    """Stable Diffusion 2's text model out of OpenCLIP's.

    whole_tower: all layers are there; the states are those of the last layer but one, so that the last is left
        out, as diffusers does. False: it was left out already
    heads, act: where they are known; else 64 wide, and as in ViT-H-14
    """
    named = clip.from_open_clip(weights)
    values = clip.infer_config(named)
    num_layers = values.get("num_hidden_layers", 0) - whole_tower
    if num_layers < 1:
        raise CheckpointError(f"{path} has an OpenCLIP text encoder without layers.")
    named = {n: w for n, w in named.items() if not n.startswith(f"encoder.layers.{num_layers}.")}
    values |= {"num_hidden_layers": num_layers, "hidden_act": act}
    if heads is not None:
        values["num_attention_heads"] = heads
    config = clip.parse_config(values)
    found = fit(named, clip.shapes(config), path, "text encoder")
    length = config.max_position_embeddings
    return ClipText(config, found, clip.tokenizer_files(length, pad_token="!"), length)


def _check_all_known(path: Path, weights: Weights, used: Iterable[str], parts: Parts) -> None:
    """Every name is used, or known to be harmless; of the latter a note says how many there are."""
    left = weights.keys() - set(used)
    unknown = sorted(name for name in left if not HARMLESS.fullmatch(name))
    if unknown:
        first = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise CheckpointError(
            f"{path} has {plural(len(unknown), 'weight')} that no part of the model has: {first}."
        )
    losses = sum("loss." in name for name in left)
    if losses:
        parts.notes.append(f"{plural(losses, 'weight')} of the training losses (loss.*) left out.")


def read_schedule(weights: Weights, path: Path) -> dict[str, Any]:
    """The schedule whose betas the file has; Stable Diffusion's where it has none."""
    table = weights.get("betas")
    if table is None:
        return dict(SCHEDULE)
    if len(table.shape) != 1 or not 2 <= table.shape[0] <= 100_000:
        raise CheckpointError(f"betas in {path} have shape {table.shape}; allowed: 2 to 100,000 numbers.")
    check_floating("betas", table, path)
    start, end = (nearby(table.rows(i, i + 1), None) for i in (0, table.shape[0] - 1))
    theirs = table.read().double()
    names: tuple[BetaName, ...] = ("scaled_linear", "linear", "cosine")
    # What ends on 1 was rescaled to end without signal, and what it ended on before is taken to be Stable Diffusion's;
    # or it is the cosine's 0.999, rounded.
    for zero_snr in (False, True) if end == 1 else (False,):
        last = SCHEDULE["beta_end"] if zero_snr else end
        for name in names:
            ours = betas(name, len(theirs), start, last)
            expected = zero_terminal_snr(ours) if zero_snr else ours
            if torch.allclose(expected, theirs, rtol=max(1e-4, 2 * rounding(table.dtype)), atol=1e-7):
                found: dict[str, Any] = {"name": name, "num_train_steps": len(theirs)}
                if zero_snr:
                    found["zero_terminal_snr"] = True
                return found if name == "cosine" else found | {"beta_start": start, "beta_end": last}
    raise CheckpointError(f"betas in {path} are of no schedule that is known; allowed: {', '.join(names)}.")


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of a number that was rounded to `dtype`."""
    return torch.finfo(dtype).eps / 2


def nearby(weight: Weight, published: float | None) -> float:
    """The one number in `weight` as it was before it was rounded: `published` if that can be, else the shortest
    decimal that rounds to it."""
    stored = weight.read().double().item()
    error = abs(stored) * max(1e-6, rounding(weight.dtype))
    shortest = (float(f"{stored:.{digits}g}") for digits in range(1, 8))
    candidates = ([] if published is None else [published]) + [*shortest, stored]
    return next((each for each in candidates if abs(each - stored) <= error), stored)
