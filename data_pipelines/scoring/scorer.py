"""The networks that score pictures, applied to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from t2i.errors import ConfigError
from t2i.evaluation.clip import Clip, load_clip
from t2i.few import plural
from t2i.weight_file import sha256

from .heads import for_watermark_detector, load_head, load_watermark_detector

HEAD_COLUMNS = ("aesthetic", "punsafe")


@dataclass(frozen=True)
class Loaded:
    """One sample. clip, watermark: (3, H, W) float32 as each network wants its pictures, None where it is not asked
    or the picture cannot be read; cause: what is wrong"""

    clip: Tensor | None
    watermark: Tensor | None
    caption: str | None
    cause: str | None


@dataclass(frozen=True)
class Scorer:
    """The networks, on `device`.

    heads: column -> head on image features
    watermark: to logits of watermark and none
    weights: column -> sha256 of what it is computed with, for all columns, in their order
    names: column -> what was recognized, for messages
    """

    device: torch.device
    clip: Clip | None
    heads: Mapping[str, nn.Module]
    watermark: nn.Module | None
    weights: Mapping[str, str]
    names: Mapping[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def preprocess(self, picture: Image.Image, columns: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
        """An RGB picture for CLIP and for the watermark detector."""
        for_clip = any(column != "pwatermark" for column in columns)
        return (
            self.clip.preprocess(picture) if self.clip is not None and for_clip else None,
            for_watermark_detector(picture) if "pwatermark" in columns else None,
        )

    def score(self, batch: Sequence[Loaded], columns: Sequence[str]) -> dict[str, list[float | None]]:
        """For each of `columns` a value for each sample, None where it has none. Raises ConfigError where the batch is
        too large for the GPU."""
        scores: dict[str, list[float | None]] = {column: [None] * len(batch) for column in columns}

        def put(column: str, rows: list[int], values: Tensor) -> None:
            for row, value in zip(rows, values.float().flatten().tolist(), strict=True):
                scores[column][row] = value

        half = torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")
        try:
            with torch.inference_mode(), half:
                rows, pictures = self._stacked([each.clip for each in batch])
                if self.clip is not None and rows:
                    features = self.clip.image_features(pictures)
                    with torch.autocast(self.device.type, enabled=False):
                        for column in set(columns) & self.heads.keys():
                            put(column, rows, self.heads[column](features))
                    told = [i for i, row in enumerate(rows) if batch[row].caption is not None]
                    if "similarity" in columns and told:
                        texts = [batch[rows[i]].caption or "" for i in told]
                        similarity = (features[told] * self.clip.text_features(texts, self.device)).sum(-1)
                        put("similarity", [rows[i] for i in told], similarity)
                rows, pictures = self._stacked([each.watermark for each in batch])
                if self.watermark is not None and rows:
                    put("pwatermark", rows, self.watermark(pictures).float().softmax(dim=1)[:, 0])
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{plural(len(batch), 'picture')} at once: too many for {self.device}; lower --batch-size."
            ) from error
        return scores

    def _stacked(self, pictures: Sequence[Tensor | None]) -> tuple[list[int], Tensor]:
        """The rows that have a picture, and these."""
        rows = [row for row, picture in enumerate(pictures) if picture is not None]
        there = [picture for picture in pictures if picture is not None]
        return rows, torch.stack(there).to(self.device) if there else torch.empty(0)


@dataclass(frozen=True)
class ScorerFiles:
    """What `t2i data score` is told. clip: see `load_clip`"""

    clip: str | None = None
    clip_weights: str | None = None
    aesthetic: Path | None = None
    nsfw: Path | None = None
    watermark: Path | None = None
    similarity: bool = False


def load_scorer(files: ScorerFiles, device: torch.device) -> Scorer:
    """Raises ConfigError where nothing is asked, or CLIP is needed and not named; CheckpointError for weights that
    cannot be read or do not fit."""
    heads = {
        column: file
        for column, file in zip(HEAD_COLUMNS, (files.aesthetic, files.nsfw), strict=True)
        if file is not None
    }
    if not (heads or files.watermark or files.similarity):
        raise ConfigError("No score is asked for; allowed: --aesthetic, --nsfw, --watermark, --similarity.")
    needs_clip = bool(heads) or files.similarity
    if needs_clip and files.clip is None:
        raise ConfigError(
            "--clip is not set; --aesthetic, --nsfw and --similarity are scores of CLIP's features."
        )
    weights, names = {}, {}
    clip = None
    if needs_clip and files.clip:
        clip = load_clip(files.clip, files.clip_weights, device, with_text=files.similarity)
    modules: dict[str, nn.Module] = {}
    for column, file in heads.items():
        assert clip is not None
        names[column], head = load_head(file, clip.width)
        modules[column] = head.to(device)
        weights[column] = f"{sha256(file)} {clip.sha256}"
    if files.similarity and clip is not None:
        names["similarity"], weights["similarity"] = "cosine of image and caption", clip.sha256
    watermark = None
    if files.watermark is not None:
        watermark = load_watermark_detector(files.watermark).to(device)
        names["pwatermark"], weights["pwatermark"] = "LAION's EfficientNet-B3", sha256(files.watermark)
    return Scorer(device, clip, modules, watermark, weights, names)
