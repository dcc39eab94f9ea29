"""What a client asks for, and what a server allows."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any

from t2i.data.decode import BadSample, decode_image, resize_and_crop
from t2i.errors import ConfigError
from t2i.interfaces import SampleRequest, Tile
from t2i.schema import check

MAX_SEED = 2**63  # what a person types, JSON and torch.Generator all take
MAX_PROMPT = 10_000  # characters
MAX_STEPS = 1000


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

    height, width: in pixels; null takes what the model was trained at
    sampling: those of the family's own options that are to differ from the model's configuration
    image: a picture file (PNG, JPEG, WebP) in base64, to start from; resized and cut to fit
    strength: how far from `image`, above 0, at most 1
    mask: a picture file in base64, resized and cut as `image` is: white where it is drawn anew, black where it is kept
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
    strength: float = 0.8
    mask: str | None = None
    tile: Tile = ""

    def request(self, size_px: int, limits: Limits) -> SampleRequest:
        """As a generator understands it. Raises ConfigError, which names the key.

        size_px: of height and width where nothing is said
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
        check(0 < self.strength <= 1, "strength", self.strength, "above 0, at most 1")
        sides = {}
        for key in ("height", "width"):
            given = getattr(self, key)
            sides[key] = size_px if given is None else given
            most = max(limits.max_side_px, size_px)
            check(1 <= sides[key] <= most, key, sides[key], f"1 to {most}")
        size = sides["height"], sides["width"]
        image = mask = None
        if self.image is not None:
            image = picture(self.image, "image", size).expand(self.num_images, -1, -1, -1)
        if self.mask is not None:
            white = (picture(self.mask, "mask", size).mean(0, keepdim=True) > 0).float()
            mask = white.expand(self.num_images, -1, -1, -1)
        return SampleRequest(
            prompts=[self.prompt] * self.num_images,
            seeds=range(self.seed, self.seed + self.num_images),
            height_px=size[0],
            width_px=size[1],
            negative_prompt=self.negative_prompt,
            image=image,
            strength=self.strength,
            mask=mask,
            tile=self.tile,
        )


def is_unicode(text: str) -> bool:
    """False for half of a pair of surrogates, which JSON can spell and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def picture(text: str, key: str, size_px: tuple[int, int]) -> Any:
    """(3, H, W) in [-1, 1] of a picture file in base64, resized until it just covers `size_px` and cut to its middle.
    Raises ConfigError, which names `key`."""
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
        image, original = decode_image(data, key, size_px)
    except (binascii.Error, BadSample) as error:
        raise ConfigError(f"{key} is not a picture file in base64: {error}.") from error
    return resize_and_crop(image, original, size_px)[0].float() / 127.5 - 1
