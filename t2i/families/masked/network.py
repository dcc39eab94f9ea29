"""What the masked transformers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class MaskedTransformer(nn.Module, ABC):
    """Tells hidden codes from the others and the caption.

    num_codes: the codes are the tokens below it
    mask_token: that stands for a hidden code, beyond all codes
    takes_any_shape: of codes, or else that which it is trained on alone
    unit: codes along each side have to be a multiple of it
    """

    def __init__(
        self, num_codes: int, takes_any_shape: bool = False, unit: int = 1, mask_token: int | None = None
    ) -> None:
        super().__init__()
        self.num_codes, self.takes_any_shape, self.unit = num_codes, takes_any_shape, unit
        self.mask_token = num_codes if mask_token is None else mask_token

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        context_mask: Tensor,
        low: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """tokens: (B, h, w) int64, codes and masks; context: (B, L, D), the caption's token states; context_mask:
        (B, L) bool, True where they are attended to; low: (B, h', w') int64, codes at a lower resolution, where the
        network is made for them; pooled: (B, P), the caption's vector -> (B, h w, num_codes) logits."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Those that Muon may step: in the blocks."""
        blocks = (list(m.parameters()) for m in self.modules() if isinstance(m, nn.ModuleList))
        return [p for parameters in blocks for p in parameters if p.ndim == 2]
