"""A model that draws what is asked of it, into a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from t2i.errors import UserError
from t2i.generation.text_to_image import batches, check_all_finite, finite_pictures, save
from t2i.interfaces import Generator
from t2i.nn import efficientnet
from t2i.schema import to_dict
from t2i.serving.gallery import Features, Gallery, Kept
from t2i.serving.queue import DrawingQueue, Job
from t2i.serving.wanted import Limits, Wanted
from t2i.text import minilm
from t2i.training.pictures import save_png

SEARCH_PX = 128
INPUTS = "inputs"  # of the pictures that clients sent


class Service:
    """checkpoint: where the model came from, for recipes; folder: of the pictures"""

    def __init__(
        self,
        generator: Generator,
        checkpoint: str,
        folder: Path,
        limits: Limits,
        batch_size: int,
        features: Features | None,
    ) -> None:
        self.generator, self.checkpoint, self.folder = generator, checkpoint, folder
        self.limits, self.batch_size = limits, batch_size
        self.gallery = Gallery(folder, features)
        self.queue = DrawingQueue(self._draw, limits.max_waiting)

    def ask(self, wanted: Wanted) -> Job:
        """Raises ConfigError for what cannot be drawn, QueueFull where too much waits."""
        return self.queue.add(wanted, wanted.checked(self.generator, self.limits))

    def _draw(self, job: Job) -> None:
        request, sampling = job.checked.request, job.checked.sampling
        recipe: dict[str, Any] = {"checkpoint": self.checkpoint, "sampling": to_dict(sampling)}
        for key, given in (("image", request.image), ("mask", request.mask)):
            if given is not None:
                recipe[key] = str(self._kept_input(given[0]))
        self.generator.sampling = sampling  # only this thread draws
        finite: list[bool] = []
        for part in batches(request, self.batch_size):
            images = self.generator.generate(part, job.progress)
            good = finite_pictures(images).tolist()
            finite += good
            for i in (i for i, each in enumerate(good) if each):
                job.pictures += save(images[i : i + 1], part.rows([i]), self.folder, recipe)
        check_all_finite(request, finite, sampling)

    def input_picture(self, named: str) -> Path | None:
        """The picture that a recipe says it started from, where it is one that a client sent here: no other file is
        ever read for a recipe."""
        path = self.folder / INPUTS / (Path(named).name or "none")
        return path if path.is_file() else None

    def alike(self, image: Image.Image, limit: int) -> list[Kept]:
        """Of the gallery, what looks most like a picture. Raises ConfigError where there are no features."""
        side = (SEARCH_PX, SEARCH_PX)
        small = image.convert("RGB").resize(side, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
        return self.gallery.like(pixels.float() / 127.5 - 1, limit)

    def _kept_input(self, image: Tensor) -> Path:
        """A picture that a client sent, or a mask, as a file that a recipe can name."""
        if len(image) == 1:
            image = image.expand(3, -1, -1) * 2 - 1
        digest = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16]
        path = self.folder / INPUTS / f"{digest}.png"
        if not path.is_file():
            save_png(image, path)
        return path


def features_at_hand() -> Features | None:
    """MiniLM for prompts and EfficientNet-Lite0 for pictures, both of which come as packages and are loaded when they
    are first asked; None without them."""
    try:
        minilm.model_folder()
        efficientnet.packaged_weights()
    except UserError:
        return None
    text = cache(lambda: minilm.MiniLMTextEncoder(64))
    pictures = cache(efficientnet.EfficientNetLite0)

    def of_prompts(prompts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            return F.normalize(text()(list(prompts)).pooled.float(), dim=1)

    def of_pictures(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return F.normalize(pictures().pooled(images).float(), dim=1)

    return Features(of_prompts, of_pictures, SEARCH_PX, "minilm, efficientnet-lite0")
