"""A model that draws what is asked of it, into a folder."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from t2i.data.decode import open_image
from t2i.errors import UserError, shortened
from t2i.files import written_whole
from t2i.generation.batch_size import BatchSize
from t2i.generation.extension import check_whole
from t2i.generation.names import file_name
from t2i.generation.prompts import Line
from t2i.generation.recipes import Recipe, differences
from t2i.generation.text_to_image import Drawing, Listener, Report, draw_files, not_finite
from t2i.interfaces import Generator
from t2i.nn import efficientnet
from t2i.schema import check, to_dict
from t2i.serving.gallery import Features, Gallery, Kept
from t2i.serving.queue import DrawingQueue, Job
from t2i.serving.wanted import MAX_STEPS, Limits, Wanted
from t2i.text import minilm
from t2i.text.tokens import TokenCounter

SEARCH_PX = 128
INPUTS = "inputs"  # of the pictures that clients sent
# By what a recipe has of them.
OF_THE_COMMAND_LINE = {
    "between": "It lies between prompts or seeds",
    "invert": "Its noise is that of a picture",
    "video": "It is a frame of a film",
}


class Service:
    """recipe: what all pictures have in common, such as where the model came from; options: the family's own options
    with changes to them, which raises ConfigError for what there is not; folder: of the pictures; tokens: of the text
    encoder, to say what it cuts, or None"""

    def __init__(
        self,
        generator: Generator,
        options: Callable[[Mapping[str, Any]], Any],
        recipe: Recipe,
        folder: Path,
        limits: Limits,
        batch_size: BatchSize,
        features: Features | None,
        tokens: TokenCounter | None = None,
    ) -> None:
        self.tokens = tokens
        self.reading = threading.Lock()  # of pictures, which takes memory: one at a time
        self.generator, self.options, self.recipe, self.folder = generator, options, recipe, folder
        self.limits, self.batch_size = limits, batch_size
        self.usual = generator.sampling  # what the model draws with where nothing is asked
        self.gallery = Gallery(folder, features)
        self.queue = DrawingQueue(self._draw, limits.max_waiting)

    def ask(self, wanted: Wanted) -> Job:
        """Raises ConfigError for what cannot be drawn, QueueFull where too much waits."""
        self.queue.check()
        sampling = self.options(wanted.sampling)
        steps = getattr(sampling, "steps", 1)
        check(steps <= MAX_STEPS, "sampling.steps", steps, f"at most {MAX_STEPS}")
        with self.reading:
            asked = wanted.request(self.generator.default_size_px, self.limits, self._kept_input)
        if wanted.extend and (wanted.height, wanted.width) == (None, None):
            check_whole(self.generator, asked.request, sampling, wanted.extend, "height {} and width {}")
        else:
            self.generator.check(asked.request, sampling)
        return self.queue.add(asked, sampling, self._cut(wanted))

    def _cut(self, wanted: Wanted) -> str:
        """What the text encoder does not take, in sentences."""
        said = []
        for key in ("prompt", "negative_prompt"):
            if self.tokens is not None and (cut := self.tokens.cut(getattr(wanted, key))):
                count, most = self.tokens.count(getattr(wanted, key)), self.tokens.max_tokens
                said.append(
                    f"{key} has {count} tokens, of which {most} are taken: {shortened(repr(cut))} is left out."
                )
        return " ".join(said)

    def _draw(self, job: Job) -> None:
        assert job.asked is not None
        request = job.asked.request
        recipe = {**self.recipe, "sampling": to_dict(job.sampling), **job.asked.recipe}
        seeds = zip(request.prompts, request.seeds, strict=True)
        names = [file_name(None, Line(prompt), seed, 0) for prompt, seed in seeds]
        drawing, report = Drawing(request, job.sampling, recipe, names), Report()
        draw_files(self.generator, [drawing], self.folder, self.batch_size, _Told(job), report)
        lines = list(report.lines.values())  # with those that were there already
        job.pictures = [self.folder / line["file"] for line in lines if "file" in line]
        bad = [f"{line['prompt']!r} seed {line['seed']}" for line in lines if "error" in line]
        if bad:
            raise UserError(not_finite(bad, len(lines), job.sampling))

    def input_picture(self, named: str) -> Path | None:
        """The picture that a recipe says it started from, where it is one that a client sent here: no other file is
        ever read for a recipe."""
        path = self.folder / INPUTS / (Path(named).name or "none")
        return path if path.is_file() else None

    def drawn_otherwise(self, recipe: Mapping[str, Any]) -> list[str]:
        """Why this server draws another picture than a recipe, which may come from anybody, says; in sentences."""
        said = [f"It was drawn with {each}." for each in differences(recipe, self.recipe)]
        for key, why in OF_THE_COMMAND_LINE.items():
            if recipe.get(key):
                said.append(f"{why}, which `t2i sample` draws and this page does not.")
        for key in ("image", "mask"):
            if recipe.get(key) and self.input_picture(str(recipe[key])) is None:
                said.append(f"Its {key} was not sent to this server: give it again.")
        return said

    def alike(self, image: Image.Image) -> list[Kept]:
        """Of the gallery, what looks most like a picture. Raises ConfigError where there are no features."""
        features = self.gallery.features
        side = SEARCH_PX if features is None else features.size_px
        small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
        return self.gallery.like(pixels.float() / 127.5 - 1)

    def _kept_input(self, data: bytes) -> Path:
        """A picture file that a client sent, under a name that a recipe can say."""
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.{str(open_image(data).format).lower()}"
        path = self.folder / INPUTS / name
        if not path.is_file():
            with written_whole(path) as unfinished:
                unfinished.write_bytes(data)
        return path


class _Told(Listener):
    def __init__(self, job: Job) -> None:
        self.job = job

    def steps(self, done: int, steps: int) -> None:
        self.job.progress(done, steps)

    def picture(self, path: Path | None) -> None:
        if path is not None:
            self.job.pictures.append(path)


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
