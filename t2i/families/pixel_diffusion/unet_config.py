"""Shape of ADM's UNet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from t2i.config import check


@dataclass(frozen=True)
class UNetConfig:
    """ADM's (2105.05233, table 11 and code), with GLIDE's attention to text (2112.10741). Its shapes: conf/denoiser/.

    model_channels: what channel_mult multiplies
    channel_mult: channels of each level, as multiples of model_channels; each level halves height and width
    num_res_blocks: residual blocks per level on the way down; the way up has one more
    attention_resolutions: downsampling factors (1, 2, 4, ...) whose levels have attention; the middle block always
        has it
    num_heads, num_head_channels: exactly one of them is given, the other follows from the level's channels
    scale_shift_norm: the time scales and shifts after the second norm ("adaptive group normalization"), or else is
        added before it
    resblock_updown: levels are joined by residual blocks that pool and repeat pixels, or else by convolutions
    dropout: probability, in the residual blocks
    patch_size: squares of so many pixels along each side become channels before the first level, and pixels again
        after the last; ADM has 1
    cross_attention: attention sees the caption's tokens beside the positions of the map
    norm_groups: of the group norms; ADM has 32, of 6 channels and more
    position_embedding: attention is told where a position lies (sines of row and column); ADM's is not
    qk_norm: RMS-normalises queries and keys per head, which bounds the logits (2302.05442); ADM does not
    """

    model_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int | None = None
    num_head_channels: int | None = None
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    dropout: float = field(kw_only=True)
    patch_size: int = field(kw_only=True)
    cross_attention: bool = True
    norm_groups: int = field(kw_only=True)
    position_embedding: bool = field(kw_only=True)
    qk_norm: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        for name in ("model_channels", "num_res_blocks", "patch_size", "norm_groups"):
            check(getattr(self, name) >= 1, f"denoiser.{name}", getattr(self, name), "1 or more")
        even = self.model_channels % 2 == 0
        check(even, "denoiser.model_channels", self.model_channels, "an even number, for the time embedding")
        check(bool(self.channel_mult), "denoiser.channel_mult", [], "at least one level")
        unit = math.lcm(4, self.norm_groups)  # 4 for sines and cosines of rows and columns
        whole = all(m > 0 and (m * self.model_channels) % unit == 0 for m in self.channel_mult)
        allowed = (
            f"levels whose channels (times model_channels, {self.model_channels}) are multiples of {unit}"
        )
        check(whole, "denoiser.channel_mult", list(self.channel_mult), allowed)
        factors = [2**level for level in range(len(self.channel_mult))]
        check(
            set(self.attention_resolutions) <= set(factors),
            "denoiser.attention_resolutions",
            list(self.attention_resolutions),
            f"any of {', '.join(map(str, factors))}",
        )
        check(
            (self.num_heads is None) != (self.num_head_channels is None),
            "denoiser.num_heads",
            self.num_heads,
            f"a number, or null where denoiser.num_head_channels (now {self.num_head_channels!r}) is given",
        )
        levels = zip(factors, self.channels(), strict=True)
        attended = sorted({c for f, c in levels if f in self.attention_resolutions or f == factors[-1]})
        for name in ("num_heads", "num_head_channels"):
            value = getattr(self, name)
            check(
                value is None or (value >= 1 and all(channels % value == 0 for channels in attended)),
                f"denoiser.{name}",
                value,
                f"a divisor of the channels of the attention levels ({', '.join(map(str, attended))})",
            )
        check(0.0 <= self.dropout < 1.0, "denoiser.dropout", self.dropout, "0 up to, but not including, 1")

    def channels(self) -> list[int]:
        """Of each level."""
        return [int(m * self.model_channels) for m in self.channel_mult]

    @property
    def downsampling(self) -> int:
        """Pixels of the picture per position of the last level along each side: height and width must be multiples
        of it."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int) -> int:
        """Attention heads of a level that has `channels` channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        assert self.num_heads is not None  # __post_init__ holds that one of the two is given
        return self.num_heads
