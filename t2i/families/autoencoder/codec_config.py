"""Configuration of what stands between the encoder and the decoder; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from t2i.config import check

MOST_CODES = 2**20


def check_entropy(weight: float, temperature: float) -> None:
    check(weight >= 0, "codec.entropy_weight", weight, "0 or more")
    check(temperature > 0, "codec.entropy_temperature", temperature, "above 0")


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
    code_dim: channels of a code; null: as many as backbone.latent_channels
    normalize: codes are looked up by cosine (both as ViT-VQGAN has it: 2110.04627, section 3.2)
    entropy_weight, entropy_temperature: as of LFQConfig; MaskGIT's published code has 0.1 and 0.01
    """

    name: Literal["vq"]
    num_codes: int = 1024
    ema_decay: float = 0.99
    commitment_weight: float = 0.25
    restart_below: float = 0.5
    code_dim: int | None = None
    normalize: bool = False
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01

    def __post_init__(self) -> None:
        check(self.num_codes >= 2, "codec.num_codes", self.num_codes, "2 or more")
        check(0 <= self.ema_decay < 1, "codec.ema_decay", self.ema_decay, "0 up to, not including, 1")
        for name in ("commitment_weight", "restart_below"):
            check(getattr(self, name) >= 0, f"codec.{name}", getattr(self, name), "0 or more")
        check_entropy(self.entropy_weight, self.entropy_temperature)
        check(
            self.code_dim is None or self.code_dim >= 1, "codec.code_dim", self.code_dim, "1 or more, or null"
        )


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


@dataclass(frozen=True)
class LFQConfig:
    """Lookup-free quantisation (2310.05737): a code is the signs of log2(num_codes) channels.

    entropy_weight: of what makes each position sure of its code and all codes used alike
    entropy_temperature: of the softmax over distances that this is computed from
    """

    name: Literal["lfq"]
    num_codes: int
    entropy_weight: float
    entropy_temperature: float
    commitment_weight: float

    def __post_init__(self) -> None:
        ok = 2 <= self.num_codes <= MOST_CODES and self.num_codes.bit_count() == 1
        check(ok, "codec.num_codes", self.num_codes, f"a power of two from 2 to {MOST_CODES:,}")
        check(self.commitment_weight >= 0, "codec.commitment_weight", self.commitment_weight, "0 or more")
        check_entropy(self.entropy_weight, self.entropy_temperature)


@dataclass(frozen=True)
class GumbelConfig:
    """Codes drawn by Gumbel softmax, as in DALL-E's discrete VAE (2102.12092, section 2.1 and appendix A.2).

    kl_weight: of KL(q(code | picture) || uniform), the nats of a picture divided by its 3HW values
    kl_warmup_images: pictures over which that weight grows from 0
    start_temperature, end_temperature, anneal_images: the temperature falls over so many pictures
    """

    name: Literal["gumbel"]
    num_codes: int
    kl_weight: float
    kl_warmup_images: int
    start_temperature: float
    end_temperature: float
    anneal_images: int

    def __post_init__(self) -> None:
        ok = 2 <= self.num_codes <= MOST_CODES
        check(ok, "codec.num_codes", self.num_codes, f"2 to {MOST_CODES:,}")
        for name in ("kl_weight", "kl_warmup_images", "anneal_images"):
            check(getattr(self, name) >= 0, f"codec.{name}", getattr(self, name), "0 or more")
        check(self.end_temperature > 0, "codec.end_temperature", self.end_temperature, "above 0")
        allowed = f"codec.end_temperature ({self.end_temperature:g}) or more"
        ok = self.start_temperature >= self.end_temperature
        check(ok, "codec.start_temperature", self.start_temperature, allowed)


DiscreteConfig = VQConfig | FSQConfig | LFQConfig | GumbelConfig
CodecConfig = KLConfig | DiscreteConfig
