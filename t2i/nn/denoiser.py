"""What the denoisers have in common: DiT, PixArt and the UNet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from t2i.interfaces import TextFeatures


class Denoiser(nn.Module, ABC):
    """Predicts noise, v, x_0 or the velocity of a noisy latent or picture given the time and the text.

    has_positions: whether it knows where in the picture it is other than by convolutions
    """

    has_positions = True

    @abstractmethod
    def conditioned(self, x: Tensor, t: Tensor, text: TextFeatures, mask: Tensor | None) -> Tensor:
        """x: (B, C, h, w); t: (B,) in [0, 1000); mask: (B, L) bool, True where a token may be attended to, None for
        all -> (B, C, h, w)."""

    @abstractmethod
    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights between hidden layers, which Muon may step."""

    def fitted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the same network at a lower resolution, as this one takes them."""
        return dict(weights)
