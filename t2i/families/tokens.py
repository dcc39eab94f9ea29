"""What families whose pictures are codes share: the codes as a feature, the codebook's hash, sizes of whole codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.codes.config import CodeSampling
from t2i.data.encoded import weights_hash
from t2i.data_config import DataConfig
from t2i.errors import CheckpointError, ConfigError
from t2i.families.codec import image_codec
from t2i.interfaces import Batch, Feature, ImageCodec, TokenCodec
from t2i.planned import PlannedNetwork, alike
from t2i.schema import check
from t2i.training.randomness import Randomness


def has_part(values: Mapping[str, Any], part: str) -> bool:
    """Whether the codec of a run of this configuration (its top-level mapping) gives what others build on: latents as a
    "codec", codes as a "token_codec"."""
    try:
        with torch.device("meta"):
            codec = image_codec(values)
    except (ConfigError, KeyError):
        return part == "codec"  # whose weights may be there all the same
    return isinstance(codec, TokenCodec) if part == "token_codec" else codec.has_latents


def smallest_integer(num_codes: int) -> torch.dtype:
    """That holds the numbers below `num_codes`."""
    kinds = (torch.uint8, torch.int16, torch.int32)
    return next(kind for kind in kinds if num_codes - 1 <= torch.iinfo(kind).max)


def codes_feature(codec: TokenCodec, made_by: str) -> Mapping[str, Feature]:
    """What a stage's `features` says of its pictures: "codes", (B, h, w) of the smallest integers that hold them.

    made_by: where the codec came from, for a person to read
    """
    dtype = smallest_integer(codec.num_codes)
    feature = Feature(
        of="image",
        tensors=("codes",),
        make=lambda image: {"codes": codec.tokens(image).to(dtype)},
        module=codec,
        weights=codec.token_weights,
        settings=(type(codec).__name__, codec.num_codes),
        made_by=made_by,
    )
    return {"codes": feature}


def check_shift(shift_px: int, size_px: int, data: DataConfig) -> None:
    """Raises ConfigError for a `shift_px` that cannot be: below 0, as far as a picture of `size_px` is wide, or
    where codes are read instead of pictures."""
    check(
        0 <= shift_px < size_px, "shift_px", shift_px, f"0 to {size_px - 1} with resolution.size_px={size_px}"
    )
    ok = shift_px == 0 or data.encoded is None
    check(ok, "shift_px", shift_px, "0 with data.encoded, whose codes are of the pictures as they are")


def moved(batch: Batch, random: Randomness, shift_px: int) -> Batch:
    """Its pictures, each moved by up to `shift_px` whole pixels along x and along y, drawn uniformly; the pixels at the
    edge repeat where it left."""
    if shift_px == 0:
        return batch
    height, width = batch.image.shape[2:]
    first = (random.uniform("shift", 2) * (2 * shift_px + 1)).long()
    rows = first[:, 0, None] + torch.arange(height, device=first.device)
    columns = first[:, 1, None] + torch.arange(width, device=first.device)
    padded = F.pad(batch.image, (shift_px,) * 4, mode="replicate").movedim(1, -1)
    picture = torch.arange(len(batch), device=first.device)[:, None, None]
    image = padded[picture, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
    return replace(batch, image=image)


@torch.no_grad()
def codes_of(batch: Batch, codec: TokenCodec) -> Tensor:
    """(B, h, w) int64 of the batch's pictures: those computed ahead, or what `codec` makes of them now."""
    codes = batch.features.get("codes")
    return codec.tokens(batch.image) if codes is None else codes.long()


def codebook_hash(codec: TokenCodec) -> str:
    """Of what decides which codes a picture has, in whatever precision a run holds it."""
    weights = ((name, value.float()) for name, value in codec.token_weights().items())
    return weights_hash(weights, type(codec).__name__, codec.num_codes)


def coding_hash(codec: ImageCodec) -> str:
    """The same, or for a codec without a codebook of what decides which latents a picture has."""
    if isinstance(codec, TokenCodec):
        return codebook_hash(codec)
    weights = ((name, value.float()) for name, value in codec.encoding_weights().items())
    return weights_hash(weights, type(codec).__name__)


def check_codebook(codec: TokenCodec, key: str, place: str, learned: str | None, start: str) -> None:
    """Raises CheckpointError where weights that go on with other codes would take these for their own.

    codec: that of `place`, which `key` names; learned: the hash of the codebook that the weights of `start` have
        learned, if they say
    """
    own = codebook_hash(codec)
    if learned not in (None, own):
        raise CheckpointError(
            f"{key}={place} has another codebook (hash {own[:12]}) than {start}, from which this run goes on, has "
            f"learned ({str(learned)[:12]}); leave {key} out, or begin anew."
        )


def grid_of(codec: TokenCodec, height_px: int, width_px: int, keys: tuple[str, str]) -> tuple[int, int]:
    """Rows and columns of a picture's codes. Raises ConfigError, with these keys, where that is not whole codes."""
    f = codec.downsampling
    for key, value in zip(keys, (height_px, width_px), strict=True):
        check(
            value >= f and value % f == 0, key, value, f"multiples of {f}, the pixels of a code along a side"
        )
    _, rows, columns = codec.latent_shape(height_px, width_px)
    return rows, columns


def planned_codec(codec: TokenCodec, size_px: int) -> list[PlannedNetwork]:
    """A frozen codec's ways there and back, as `t2i.families.family.Family.plan` gives networks."""
    grid = codec.latent_shape(size_px, size_px)[1:]
    encoding, decoding = codec.encoding_weights(), _Decoding(codec)
    encoder = sum(p.numel() for name, p in codec.named_parameters() if name in encoding)
    decoder = sum(p.numel() for p in codec.parameters()) - encoder
    return [
        PlannedNetwork(
            "codec encoder",
            _Encoding(codec),
            lambda batch: {"image": torch.empty(batch, 3, size_px, size_px)},
            trained=False,
            cached_as="codes",
            saved=True,
            num_parameters=encoder,
        ),
        PlannedNetwork(
            "codec decoder",
            decoding,
            lambda batch: {"codes": torch.zeros(batch, *grid, dtype=torch.int64)},
            trained=False,
            calls_per_image=0,
            cached_as="codes",
            saved=True,
            num_parameters=decoder,
            drawing=alike(1, lambda: decoding(torch.zeros(1, *grid, dtype=torch.int64))),
        ),
    ]


def rows_drawn(sampling: CodeSampling) -> int:
    """Of a batch that draws one picture: guidance takes a second one."""
    return 1 + (sampling.guidance_scale != 1)


class _Encoding(nn.Module):
    def __init__(self, codec: TokenCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, image: Tensor) -> Tensor:
        return self.codec.moments(image)


class _Decoding(nn.Module):
    def __init__(self, codec: TokenCodec) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, codes: Tensor) -> Tensor:
        return self.codec.decode_tokens(codes)
