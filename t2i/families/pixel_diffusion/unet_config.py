"""Shape of ADM's UNet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from t2i.config import check
from t2i.nn.unet_config import UNetShape


@dataclass(frozen=True)
class UNetConfig(UNetShape):
    """ADM's (2105.05233, table 11 and code), with GLIDE's attention to text (2112.10741). Its shapes: conf/denoiser/.

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

    scale_shift_norm: bool = True
    resblock_updown: bool = True
    dropout: float = field(kw_only=True)
    patch_size: int = field(kw_only=True)
    cross_attention: bool = True
    norm_groups: int = field(kw_only=True)
    position_embedding: bool = field(kw_only=True)
    qk_norm: bool = field(kw_only=True)
    name: Literal["adm"] = "adm"

    def __post_init__(self) -> None:
        for name in ("model_channels", "patch_size", "norm_groups"):
            check(getattr(self, name) >= 1, f"denoiser.{name}", getattr(self, name), "1 or more")
        even = self.model_channels % 2 == 0
        check(even, "denoiser.model_channels", self.model_channels, "an even number, for the time embedding")
        unit = math.lcm(4, self.norm_groups)  # 4 for sines and cosines of rows and columns
        whole = all(m > 0 and (m * self.model_channels) % unit == 0 for m in self.channel_mult)
        allowed = (
            f"levels whose channels (times model_channels, {self.model_channels}) are multiples of {unit}"
        )
        check(whole, "denoiser.channel_mult", list(self.channel_mult), allowed)
        super().__post_init__()
        check(0.0 <= self.dropout < 1.0, "denoiser.dropout", self.dropout, "0 up to, but not including, 1")

    @property
    def downsampling(self) -> int:
        """Pixels of the picture per position of the last level along each side: height and width must be multiples
        of it."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)
