"""Options of drawing codes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from t2i.config import check
from t2i.schema import check_scale


@dataclass(frozen=True)
class CodeSampling:
    """temperature: logits are divided by it; 0 takes the most likely code
    top_k: only so many of the most likely codes can be drawn (1805.04833); null: all
    top_p: only the most likely codes that together have this probability (1904.09751); 1: all
    guidance_scale: of classifier-free guidance on logits (2203.13131, section 3.3); 1 is without
    """

    temperature: float
    top_k: int | None
    top_p: float
    guidance_scale: float

    def __post_init__(self) -> None:
        for key in ("temperature", "guidance_scale"):
            check_scale(f"sampling.{key}", getattr(self, key))
        check(self.top_k is None or self.top_k >= 1, "sampling.top_k", self.top_k, "1 or more, or null")
        check(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "more than 0, at most 1")

    def check_codes(self, num_codes: int) -> None:
        """Raises ConfigError where there are fewer codes than top_k."""
        ok = self.top_k is None or self.top_k <= num_codes
        check(ok, "sampling.top_k", self.top_k, f"at most {num_codes}, the number of codes, or null")
