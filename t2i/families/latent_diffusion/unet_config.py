"""Shape of the latent diffusion UNet."""

from __future__ import annotations

from dataclasses import dataclass, field

from t2i.config import check
from t2i.nn.unet_config import UNetShape


@dataclass(frozen=True)
class UNetConfig(UNetShape):
    """Stable Diffusion 1's and 2's shapes are in conf/denoiser/; their context_dim is 768 and 1024, LDM-1.45B's 1280.

    in_channels, out_channels: of the latent
    transformer_depth: transformer blocks after each residual block
    context_dim: width of the text tokens
    use_linear_in_transformer: project in and out of transformers by a linear layer, not by a 1x1 convolution
    dropout: probability, in the residual blocks
    """

    channel_mult: tuple[int, ...]
    use_linear_in_transformer: bool = field(kw_only=True)
    transformer_depth: int = 1
    dropout: float = 0.0
    in_channels: int = 4
    out_channels: int = 4
    context_dim: int = 768

    def __post_init__(self) -> None:
        counts = ("in_channels", "out_channels", "transformer_depth", "context_dim")
        for name in counts:
            check(getattr(self, name) >= 1, f"denoiser.{name}", getattr(self, name), "1 or more")
        check(
            self.model_channels >= 32 and self.model_channels % 32 == 0,
            "denoiser.model_channels",
            self.model_channels,
            "a multiple of 32, for the 32 groups of the group norms",
        )
        check(
            all(m >= 1 for m in self.channel_mult),
            "denoiser.channel_mult",
            self.channel_mult,
            "levels of 1 or more",
        )
        super().__post_init__()
        check(0.0 <= self.dropout < 1.0, "denoiser.dropout", self.dropout, "0 up to, but not including, 1")

    @property
    def downsampling(self) -> int:
        """Height and width of the latent must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)
