"""The few records and Protocols that packages share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from t2i.schema import check


@dataclass
class TextFeatures:
    """What a text encoder says of B captions.

    tokens: (B, L, D) float, one state per token
    pooled: (B, P) float, one vector per caption
    mask: (B, L) bool, True where the token is part of the caption (False: padding)
    """

    tokens: Tensor
    pooled: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextFeatures:
        """A copy on `device`, the floating tensors as `dtype`."""
        return TextFeatures(
            tokens=self.tokens.to(device, dtype),
            pooled=self.pooled.to(device, dtype),
            mask=self.mask.to(device),
        )


@dataclass
class Batch:
    """One batch of captioned pictures, as the read path gives it to a stage.

    image: (B, 3, H, W) float32 in [-1, 1]; (B, 3, 0, 0) where `features` of the pictures stand in for it. Between the
        reader processes and `to` it is uint8: a quarter of the bytes to carry
    caption: B strings; "" where text dropout removed the caption
    key: B strings, unique within the dataset
    original_size: (B, 2) int64, height and width in pixels of the source picture
    crop: (B, 2) int64, top and left of the crop in pixels after resizing
    metadata: B dictionaries, the sample's JSON
    position: (B,) int64, the samples' places in the endless stream of the run; what is drawn for a sample depends on it
    bad: how many samples could not be read while this batch was filled, by cause
    features: what was computed ahead of training, by the names that `Feature.make` gave it: (B, ...), floating ones
        float32
    """

    image: Tensor
    caption: list[str]
    key: list[str]
    original_size: Tensor
    crop: Tensor
    metadata: list[dict[str, Any]]
    position: Tensor
    bad: dict[str, int] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.caption)

    def to(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32, non_blocking: bool = True
    ) -> Batch:
        """A copy with its tensors on `device`, its pixels in [-1, 1]; the floating ones as `dtype`."""
        there = self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if there.image.dtype == torch.uint8:
            there.image = there.image.to(dtype).div_(127.5).sub_(1.0)
        return there._mapped(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def split(self, parts: int) -> list[Batch]:
        """Views of the batch in so many parts of one size. The bad samples are counted in the first."""
        size = len(self) // parts
        return [self._rows(slice(i * size, (i + 1) * size), self.bad if i == 0 else {}) for i in range(parts)]

    def rows(self, places: Sequence[int]) -> Batch:
        """A copy of those samples alone, without the count of the bad ones."""
        part = self._mapped(lambda tensor: tensor[list(places)])
        part.caption, part.key = [self.caption[i] for i in places], [self.key[i] for i in places]
        part.metadata, part.bad = [self.metadata[i] for i in places], {}
        return part

    def _rows(self, rows: slice, bad: dict[str, int]) -> Batch:
        part = self._mapped(lambda tensor: tensor[rows])
        part.caption, part.key, part.metadata = self.caption[rows], self.key[rows], self.metadata[rows]
        part.bad = bad
        return part

    def pin_memory(self) -> Batch:
        """A copy with its tensors in page-locked memory (called by the DataLoader)."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            image=change(self.image),
            original_size=change(self.original_size),
            crop=change(self.crop),
            position=change(self.position),
            features={name: change(tensor) for name, tensor in self.features.items()},
        )


class TextEncoder(Protocol):
    """Captions in, features out. Implementations are `torch.nn.Module`s.

    token_dim: D, width of the token states
    pooled_dim: P, width of the pooled vector
    max_tokens: L, length that captions are padded or cut to
    trainable: False for frozen encoders, whose weights never enter a stage's checkpoint
    """

    token_dim: int
    pooled_dim: int
    max_tokens: int
    trainable: bool

    def __call__(self, captions: Sequence[str]) -> TextFeatures: ...

    def to(self, device: Any, dtype: torch.dtype | None = None) -> Any: ...


class ImageCodec(nn.Module, ABC):
    """Pictures to latents of C = latent_channels and back.

    downsampling: pixels of the picture per latent position along each side
    has_latents: whether diffusion can learn what `encode` gives; logits of codes have no scale
    """

    downsampling: int
    latent_channels: int
    has_latents = True

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f) scaled to about unit variance: a sample of the
        posterior, made with `noise` ~ N(0, I) of that shape, or its mode where that is None."""
        return self.latent(self.moments(image), noise)

    @abstractmethod
    def moments(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, M, H/f, W/f): all that `latent` needs to know of the picture; unscaled."""

    @abstractmethod
    def latent(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """`encode` is `latent` of `moments`."""

    @abstractmethod
    def encoding_weights(self) -> Mapping[str, Tensor]:
        """What decides `moments`, by name."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w), scaled as `encode` gives them -> (B, 3, h*f, w*f), about [-1, 1], not clamped."""

    def latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """(C, H/f, W/f) of a picture."""
        return self.latent_channels, height_px // self.downsampling, width_px // self.downsampling


class TokenCodec(ImageCodec):
    """One whose latents are codes of a codebook: pictures are tokens too, from 0 up to, not including, num_codes."""

    num_codes: int

    @abstractmethod
    def tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, H/f, W/f) int64."""

    @abstractmethod
    def token_weights(self) -> Mapping[str, Tensor]:
        """What decides `tokens`, by name."""

    @abstractmethod
    def code_vectors(self) -> Tensor:
        """(num_codes, D): what each code stands for, so that codes that look alike lie together."""

    @abstractmethod
    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, 3, h*f, w*f), about [-1, 1], not clamped."""


FeatureOf = Literal["image", "caption"]


@dataclass(frozen=True)
class Feature:
    """Something that a stage makes of its data by frozen weights, so that it can be computed ahead of training.

    of: what it is made of: "image": pictures (B, 3, H, W) in [-1, 1], which are then not read while training; or
        "caption": B captions
    tensors: names of what is made; no two features of a stage share one
    make: -> those tensors by name, each (B, ...), of pictures vectors (B, P) or maps (B, ..., h, w)
    module: what computes it; moved to the device beforehand
    weights: those that decide the result, by name
    settings: whatever else decides it
    made_by: where the weights came from, for a person to read
    """

    of: FeatureOf
    tensors: tuple[str, ...]
    make: Callable[[Any], Mapping[str, Tensor]]
    module: nn.Module
    weights: Callable[[], Mapping[str, Tensor]]
    settings: tuple[object, ...]
    made_by: str


Tile = Literal["", "x", "y", "xy"]


@dataclass(frozen=True)
class Between:
    """Other ends for N pictures: picture i lies shares[i] of the way from its own prompt and noise to these, along the
    great circle (`t2i.nn.between.slerp`).

    prompts, seeds: N of each, or None for the pictures' own
    shares: N numbers from 0 to 1
    """

    shares: Sequence[float]
    prompts: Sequence[str] | None = None
    seeds: Sequence[int] | None = None

    def rows(self, places: Sequence[int]) -> Between:
        """Of those pictures alone."""

        def of(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in places]

        return Between([self.shares[i] for i in places], of(self.prompts), of(self.seeds))


@dataclass(frozen=True)
class SampleRequest:
    """What to draw: all that every family understands. What only some do (steps, guidance, temperature, ...) is in
    `Generator.sampling`. Picture i takes prompts[i] and its noise from `torch.Generator("cpu")` seeded with seeds[i],
    so that it depends neither on the batch nor on the device.

    image: (N, 3, height_px, width_px) float32 in [-1, 1] to start from, or None to start from noise
    strength: above 0, at most 1: how much of the way from noise is walked; with `image` only
    mask: (N, 1, height_px, width_px), 1 where `image` is drawn anew and 0 where it stays as it is
    between: what the pictures lie between, or None where each is that of its own prompt and seed
    noise: (N, ...) to start from in place of the seeds' own, as `Generator.invert` gives it
    tile: the axes along which the pictures continue on their other side: "x", "y", "xy" or "" for none

    Raises ConfigError where these do not fit together.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    height_px: int
    width_px: int
    negative_prompt: str = ""
    image: Tensor | None = None
    strength: float = 0.8
    mask: Tensor | None = None
    between: Between | None = None
    noise: Tensor | None = None
    tile: Tile = ""

    def __post_init__(self) -> None:
        check(self.tile in get_args(Tile), "tile", self.tile, "x, y, xy")
        own = self.between is None or self.between.seeds is None
        check(self.noise is None or own, "noise", "given", "none, or no other seeds to lie between")
        if self.mask is None:
            return
        check(self.image is not None, "mask", "given", "only with a picture to start from")
        size = (self.height_px, self.width_px)
        found = tuple(self.mask.shape[-2:])
        check(found == size, "mask (height, width)", found, f"{size}, as the picture has")
        values = bool(((self.mask == 0) | (self.mask == 1)).all())
        check(values, "mask", "of other values", "0 where the picture is kept, 1 where it is drawn anew")
        check(bool(self.mask.any()), "mask", "empty", "one that marks something to draw anew")

    def rows(self, places: Sequence[int]) -> SampleRequest:
        """The request for those of its pictures alone."""
        chosen = list(places)

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[chosen]

        return replace(
            self,
            prompts=[self.prompts[i] for i in chosen],
            seeds=[self.seeds[i] for i in chosen],
            image=of(self.image),
            mask=of(self.mask),
            noise=of(self.noise),
            between=None if self.between is None else self.between.rows(chosen),
        )

    @classmethod
    def of_size(cls, prompts: Sequence[str], size_px: int) -> SampleRequest:
        """One square picture per prompt, seeds counting from 0."""
        return cls(prompts=prompts, seeds=range(len(prompts)), height_px=size_px, width_px=size_px)


Progress = Callable[[int, int], None]  # steps done, steps


class TextToImage(nn.Module, ABC):
    """A model that draws pictures for prompts.

    text: a frozen encoder's weights are not among the model's: it is loaded from where the configuration says
    """

    text: TextEncoder

    def check(self, request: SampleRequest, sampling: Any) -> None:
        """Raises ConfigError for what this model does not draw; see `Generator`. sampling: as `generate` takes it"""

    @abstractmethod
    def generate(self, request: SampleRequest, sampling: Any, progress: Progress | None = None) -> Tensor:
        """-> (N, 3, height_px, width_px) in [-1, 1], NaN where the numbers were not finite, on the model's device; see
        `Generator`. sampling: the family's own options"""

    def invert(self, request: SampleRequest, sampling: Any, progress: Progress | None = None) -> Tensor:
        """The noise for request.image, on the model's device; see `Generator`."""
        check(False, "image", "a picture to invert", "none with this model")
        raise AssertionError


class Generator(Protocol):
    """Any family's way from prompts to pictures.

    sampling: a dataclass, the family's own options: the entry `sampling` of its configuration; may be replaced
    precision: what it computes in, as a run's trainer.precision names it
    """

    default_size_px: int
    sampling: Any
    precision: str

    def compile(self) -> None:
        """Has torch compile the networks, block by block, when they are first called."""
        ...

    def check(self, request: SampleRequest, sampling: Any) -> None:
        """Raises ConfigError for what this model cannot do with these options: a size, a negative prompt, a picture to
        start from, a number of steps. Draws nothing, so that an answer is there at once."""
        ...

    def generate(self, request: SampleRequest, progress: Progress | None = None) -> Tensor:
        """-> (len(request.prompts), 3, height_px, width_px) float32 on the CPU, in [-1, 1]; NaN where a picture
        came to numbers that are not finite. progress: called after each step, and may raise to stop.
        Raises ConfigError as `check` does."""
        ...

    def invert(self, request: SampleRequest, progress: Progress | None = None) -> Tensor:
        """The noise from which sampler ddim draws request.image for request.prompts, at guidance_scale 1 and in as many
        steps as `sampling` says, up to the error of these steps: what `SampleRequest.noise` takes, on the CPU.
        Raises ConfigError where this model cannot tell."""
        ...
