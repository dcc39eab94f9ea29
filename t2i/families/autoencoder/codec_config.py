"""Configuration of what stands between the encoder and the decoder; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from t2i.config import check

MOST_CODES = 2**20


@dataclass(frozen=True)
class KLConfig:
    """A Gaussian posterior, pulled towards N(0, I) by kl_weight (LDM paper, section 3.1 and appendix G)."""

    name: Literal["kl"]
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        check(self.kl_weight >= 0, "codec.kl_weight", self.kl_weight, "0 or more")


@dataclass(frozen=True)
class VQConfig:
    """A codebook of num_codes vectors, kept by moving averages (1711.00937, appendix A.1).

    restart_below: a code whose average use falls below this share of uniform use is set to an encoder output
    """

    name: Literal["vq"]
    num_codes: int = 1024
    ema_decay: float = 0.99
    commitment_weight: float = 0.25
    restart_below: float = 0.5

    def __post_init__(self) -> None:
        check(self.num_codes >= 2, "codec.num_codes", self.num_codes, "2 or more")
        check(0 <= self.ema_decay < 1, "codec.ema_decay", self.ema_decay, "0 up to, not including, 1")
        check(self.commitment_weight >= 0, "codec.commitment_weight", self.commitment_weight, "0 or more")
        check(self.restart_below >= 0, "codec.restart_below", self.restart_below, "0 or more")


@dataclass(frozen=True)
class FSQConfig:
    """Finite scalar quantisation (2309.15505): no codebook is learned.

    levels: how many values each channel has; their product is the number of codes
    """

    name: Literal["fsq"]
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        allowed = "one or more numbers from 3 on (codec=lfq has two values a channel)"
        check(bool(self.levels) and min(self.levels) >= 3, "codec.levels", list(self.levels), allowed)
        allowed = f"levels whose product is at most {MOST_CODES:,}"
        check(math.prod(self.levels) <= MOST_CODES, "codec.levels", list(self.levels), allowed)


CodecConfig = KLConfig | VQConfig | FSQConfig
