"""CLIP models from local files, as open_clip or transformers saves them, with their published preprocessing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from t2i.errors import CheckpointError, ConfigError
from t2i.training.pictures import to_pil
from t2i.weight_file import named_by_content, reason_of, sha256


@dataclass(frozen=True)
class Clip:
    """name: what was loaded, for messages
    width: of the features
    preprocess: an RGB picture -> (3, H, W) float32
    encode_image: (B, 3, H, W) -> (B, width); encode_text: token ids (B, L) -> (B, width); neither normalised
    tokenize: texts -> token ids, cut to the model's context; None: it was loaded for pictures only
    sha256: of the weights and the configuration that decides what is made of them
    """

    width: int
    preprocess: Callable[[Image.Image], Tensor]
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    tokenize: Callable[[list[str]], Tensor] | None
    sha256: str

    def image_features(self, pictures: Tensor) -> Tensor:
        """(B, width) float32 of length 1, as LAION stores its embeddings."""
        return normalize(self.encode_image(pictures).float(), dim=-1)

    def features_of_drawn(self, images: Tensor, device: torch.device) -> Tensor:
        """The same of pictures as generators give them, (B, 3, H, W) in [-1, 1] of any size."""
        pictures = torch.stack([self.preprocess(to_pil(image)) for image in images])
        return self.image_features(pictures.to(device))

    def text_features(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """(B, width) float32 of length 1."""
        assert self.tokenize is not None
        return normalize(self.encode_text(self.tokenize(list(texts)).to(device)).float(), dim=-1)


def load_clip(
    model: str,
    weights: str | None,
    device: torch.device,
    with_text: bool,
    flag: str = "--clip",
) -> Clip:
    """
    model: a folder with a CLIP of open_clip (`open_clip_config.json`) or of transformers (`config.json`), or the name
        of an architecture of open_clip
    weights: with a name, its local file: .safetensors, or a .pt that weights_only reads
    with_text: with the tokenizer
    flag: by which `model` was given, for messages
    Raises ConfigError, or CheckpointError where the files are missing or do not fit.
    """
    folder = Path(model)
    if folder.is_dir() and weights is not None:
        raise ConfigError(
            f"{flag} {model} is a folder; --clip-weights is allowed with an architecture's name only."
        )
    try:
        if (folder / "open_clip_config.json").is_file():
            return _open_clip(f"local-dir:{folder}", None, _files_of(folder), device, with_text)
        if (folder / "config.json").is_file():
            return _transformers(folder, device, with_text)
        if folder.is_dir():
            raise CheckpointError(f"{flag} {model} holds neither open_clip_config.json nor config.json.")
        import open_clip

        if model not in open_clip.list_models():
            raise ConfigError(
                f"{flag} is {model!r}; allowed: a folder with a CLIP, or a name of open_clip.list_models()."
            )
        if weights is None or not Path(weights).is_file():
            raise CheckpointError(
                f"--clip-weights is {weights!r}; allowed with {flag} {model}: an existing file."
            )
        with named_by_content(Path(weights)) as named:
            return _open_clip(model, str(named), [Path(weights)], device, with_text)
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # whatever the readers of four file formats raise
        raise CheckpointError(f"{flag} {model} cannot be loaded: {reason_of(error)}") from error


def _open_clip(
    name: str, weights: str | None, files: list[Path], device: torch.device, with_text: bool
) -> Clip:
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from t2i.text.byte_pairs import of_any_length

    model = open_clip.create_model(name, pretrained=weights, require_pretrained=True, weights_only=True)
    model = model.eval().requires_grad_(False).to(device)
    visual: Any = model.visual
    config = PreprocessCfg(**visual.preprocess_cfg)
    preprocess = image_transform_v2(config, is_train=False)
    tokenize: Any = open_clip.get_tokenizer(name) if with_text else None
    if isinstance(tokenize, SimpleTokenizer):
        tokenize = of_any_length(tokenize)
    with torch.inference_mode():
        width = model.encode_image(torch.zeros(1, *config.input_size, device=device)).shape[1]
    return Clip(
        width,
        preprocess,
        model.encode_image,
        model.encode_text,
        tokenize,
        f"{name} {sha256(*files)}" if weights else sha256(*files),
    )


def _transformers(folder: Path, device: torch.device, with_text: bool) -> Clip:
    from open_clip.transform import image_transform_v2
    from transformers import CLIPModel, CLIPTokenizer

    from t2i.text.pretrained import quiet

    described = json.loads((folder / "config.json").read_text())
    if described.get("model_type") != "clip":
        raise CheckpointError(f"{folder} holds a {described.get('model_type')!r} model; allowed: 'clip'.")
    with quiet():
        loaded: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder} is not a whole CLIP: it lacks {missing[0]}.")
    model = model.eval().requires_grad_(False).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True) if with_text else None

    def tokenize(texts: list[str]) -> Tensor:
        assert tokenizer is not None
        context = model.config.text_config.max_position_embeddings
        ids: Tensor = tokenizer(
            texts, padding="max_length", truncation=True, max_length=context, return_tensors="pt"
        ).input_ids
        return ids

    return Clip(
        model.config.projection_dim,
        image_transform_v2(_preprocessing(folder, model.config.vision_config.image_size), is_train=False),
        lambda pictures: model.get_image_features(pictures).pooler_output,
        lambda ids: model.get_text_features(ids).pooler_output,
        tokenize if with_text else None,
        sha256(*_files_of(folder)),
    )


def _preprocessing(folder: Path, image_px: int) -> Any:
    """open_clip's PreprocessCfg of transformers' `preprocessor_config.json`; OpenAI's where there is none. Crops as
    OpenAI did; transformers' crop lies one pixel beside it where the margin is odd."""
    from open_clip.transform import PreprocessCfg

    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return PreprocessCfg(size=image_px)
    settings = json.loads(file.read_text())
    size, crop = settings.get("size", image_px), settings.get("crop_size", image_px)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    height = crop.get("height") if isinstance(crop, dict) else crop
    resample = settings.get("resample", 3)
    if not (shortest == height == image_px) or resample not in (2, 3):
        raise CheckpointError(
            f"{file} resizes to {size} by method {resample} and crops to {crop}; allowed: shorter side and crop "
            f"{image_px}, method 2 or 3."
        )
    mean, std = settings.get("image_mean"), settings.get("image_std")
    interpolation = {2: "bilinear", 3: "bicubic"}[resample]
    known = {"mean": tuple(mean)} if mean else {}
    if std:
        known["std"] = tuple(std)
    return PreprocessCfg(size=image_px, interpolation=interpolation, **known)


def _files_of(folder: Path) -> list[Path]:
    """What features depend on: configuration, vocabulary and weights, safetensors first."""
    described = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt")]
    for suffixes in ((".safetensors",), (".bin", ".pt", ".pth")):
        if weights := [path for path in sorted(folder.iterdir()) if path.suffix in suffixes]:
            return [*described, *weights]
    raise CheckpointError(f"{folder} holds no weights; allowed: .safetensors, .bin, .pt or .pth.")
