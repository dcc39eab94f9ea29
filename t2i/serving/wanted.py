"""What a client asks for, and what a server allows."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from t2i.data.decode import BadSample, stored_size
from t2i.errors import ConfigError, UserError
from t2i.generation.extension import SIDES, around, usual_strength, within
from t2i.generation.recipes import Recipe, of_files
from t2i.generation.starting import read_start
from t2i.interfaces import SampleRequest, Tile
from t2i.schema import check, is_unicode

MAX_SEED = 2**63  # what a person types, JSON and torch.Generator all take
MAX_PROMPT = 10_000  # characters
MAX_STEPS = 1000
MAX_PIXELS = 2**24  # of a picture to start from


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    max_side_px: of height and width
    max_images: pictures
    max_waiting: requests that wait to be drawn
    max_bytes: of a request's body
    """

    max_side_px: int = 1024
    max_images: int = 16
    max_waiting: int = 64
    max_bytes: int = 32 * 2**20


@dataclass(frozen=True)
class Wanted:
    """The body of `POST /api/generate`.

    height, width: in pixels; null takes what the model was trained at, with `extend` the picture's own size and what it
        is extended by
    sampling: those of the family's own options that are to differ from the model's configuration
    image: a picture file (PNG, JPEG, WebP) in base64, to start from; resized and cut to fit, on white
        where it is transparent
    strength: how far from `image`, above 0, at most 1; null: 0.8, or 1 with `mask` or `extend`
    mask: a picture file in base64, of the size of `image`: white (128 or more of 255) where it is drawn anew, black or
        transparent where it is kept
    extend: pixels by side (left, right, top, bottom) that are drawn around `image`
    tile: the axes along which the pictures continue on their other side: "x", "y", "xy" or "" for none
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    extend: dict[str, int] = field(default_factory=dict)
    tile: Tile = ""

    def request(self, size_px: int, limits: Limits, keep: Callable[[bytes], Path]) -> Asked:
        """As a generator understands it. Raises UserError, which names the key.

        size_px: of height and width where nothing is said; keep: writes a picture file and says where
        """
        for key in ("prompt", "negative_prompt"):
            check(is_unicode(getattr(self, key)), key, getattr(self, key), "text in Unicode")
            length = len(getattr(self, key))
            check(length <= MAX_PROMPT, key, f"{length:,} characters", f"at most {MAX_PROMPT:,}")
        check(
            1 <= self.num_images <= limits.max_images,
            "num_images",
            self.num_images,
            f"1 to {limits.max_images}",
        )
        last = MAX_SEED - self.num_images
        check(0 <= self.seed <= last, "seed", self.seed, f"0 to {last}")
        ok = self.strength is None or 0 < self.strength <= 1
        check(ok, "strength", self.strength, "above 0, at most 1")
        for key, given in (("mask", self.mask), ("extend", self.extend), ("strength", self.strength)):
            check(not given or self.image is not None, key, "given", "only with image")
        for side, pixels in self.extend.items():
            check(side in SIDES, "extend", side, ", ".join(SIDES))
            check(1 <= pixels <= limits.max_side_px, f"extend.{side}", pixels, f"1 to {limits.max_side_px}")
        whole = self.height or size_px, self.width or size_px
        most = max(limits.max_side_px, size_px)
        for key in ("height", "width"):
            given = getattr(self, key)
            check(given is None or 1 <= given <= most, key, given, f"1 to {most}")
        kept: Recipe = {}
        start = None
        if self.image is not None:
            inner, files = self._inner(whole), {"image": file_of(self.image, "image")}
            if self.mask is not None:
                files["mask"] = file_of(self.mask, "mask")
            if inner is None:
                height, width = stored_size(files["image"], "image")
                added = around(self.extend)
                whole = height + added[0], width + added[1]
            check(max(whole) <= most, "height x width", f"{whole[0]} x {whole[1]}", f"at most {most} each")
            paths = {key: keep(data) for key, data in files.items()}
            image, mask = paths["image"], paths.get("mask")
            try:
                start = read_start(image, inner, mask, self.extend or None)
            except UserError as error:  # which names files of this server
                said = str(error).replace(f"--mask {mask}", "mask").replace(str(mask), "mask")
                raise ConfigError(said.replace(str(image), "image")) from error
            extend = ",".join(f"{side}={pixels}" for side, pixels in self.extend.items())
            kept = of_files(image=image, mask=mask) | ({"extend": extend} if extend else {})

        def repeated(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.expand(self.num_images, -1, -1, -1)

        usual = usual_strength(bool(self.mask or self.extend))
        request = SampleRequest(
            prompts=[self.prompt] * self.num_images,
            seeds=range(self.seed, self.seed + self.num_images),
            height_px=whole[0],
            width_px=whole[1],
            negative_prompt=self.negative_prompt,
            image=None if start is None else repeated(start.image),
            strength=usual if self.strength is None else self.strength,
            mask=None if start is None else repeated(start.mask),
            tile=self.tile,
        )
        return Asked(request, kept)

    def _inner(self, whole: tuple[int, int]) -> tuple[int, int] | None:
        """(height, width) of `image` within the whole; None: its own."""
        if not self.extend:
            return whole
        if self.height is None and self.width is None:
            return None
        return within(whole, self.extend, "extend", self.extend)


@dataclass(frozen=True)
class Asked:
    """recipe: what a recipe says of what the pictures start from, as `t2i sample` has it"""

    request: SampleRequest
    recipe: Recipe


def file_of(text: str, key: str) -> bytes:
    """A picture file of base64. Raises ConfigError, which names `key`."""
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
        height, width = stored_size(data, key)
    except BadSample as error:
        raise ConfigError(f"{key} is not a picture file in base64: {error.detail}.") from error
    except ValueError as error:  # other letters than ASCII's are a plain one
        raise ConfigError(f"{key} is not a picture file in base64: {error}.") from error
    check(height * width <= MAX_PIXELS, key, f"{width} x {height} px", f"at most {MAX_PIXELS:,} pixels")
    return data
