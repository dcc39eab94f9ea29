"""Shape of a transformer over tokens. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t2i.config import check


@dataclass(frozen=True)
class TransformerConfig:
    """A pre-norm transformer over tokens (GPT-2's, Radford et al. 2019).

    width, depth, heads: the MLPs are mlp_ratio times as wide
    positions: "learned", a vector for each place of the grid, or "rotary", which turns queries and keys by row and
        column (2104.09864)
    norm: "layer", with weight and bias, or "rms" (1910.07467)
    activation: of the MLPs; "quick_gelu" is x sigmoid(1.702 x)
    bias: of all matrices
    qk_norm: normalises queries and keys (2302.05442)
    dropout: of the embeddings and of what each branch adds
    code_vectors: a picture's codes are known by their vectors in the codec's codebook too (2409.16211)
    """

    width: int
    depth: int
    heads: int
    positions: Literal["learned", "rotary"]
    norm: Literal["layer", "rms"]
    bias: bool
    qk_norm: bool
    dropout: float
    mlp_ratio: int = 4
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    code_vectors: bool = False

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "mlp_ratio"):
            check(getattr(self, key) >= 1, f"transformer.{key}", getattr(self, key), "1 or more")
        whole = self.width % self.heads == 0
        check(whole, "transformer.width", self.width, f"a multiple of heads ({self.heads})")
        ok = self.positions == "learned" or self.width % (4 * self.heads) == 0
        allowed = f"a multiple of 4 heads ({4 * self.heads}) with positions=rotary"
        check(ok, "transformer.width", self.width, allowed)
        check(0 <= self.dropout < 1, "transformer.dropout", self.dropout, "0 up to, not including, 1")
