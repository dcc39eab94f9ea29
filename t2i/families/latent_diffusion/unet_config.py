"""Shape of the latent diffusion UNet."""

from __future__ import annotations

from dataclasses import dataclass, field

from t2i.config import check


@dataclass(frozen=True)
class UNetConfig:
    """Stable Diffusion 1's and 2's shapes are in conf/denoiser/; their context_dim is 768 and 1024, LDM-1.45B's 1280.

    in_channels, out_channels: of the latent
    model_channels: channels of the first level
    channel_mult: channels of each level, as multiples of model_channels; each level halves height and width
    num_res_blocks: residual blocks per level on the way down; the way up has one more
    attention_resolutions: downsampling factors (1, 2, 4, ...) whose levels have transformers, as in LDM;
        the middle block always has one
    num_heads, num_head_channels: exactly one of them is given, the other follows from the level's channels
    transformer_depth: transformer blocks after each residual block
    context_dim: width of the text tokens
    use_linear_in_transformer: project in and out of transformers by a linear layer, not by a 1x1 convolution
    dropout: probability, in the residual blocks
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int | None = None
    num_head_channels: int | None = None
    use_linear_in_transformer: bool = field(kw_only=True)
    transformer_depth: int = 1
    dropout: float = 0.0
    in_channels: int = 4
    out_channels: int = 4
    context_dim: int = 768

    def __post_init__(self) -> None:
        counts = ("in_channels", "out_channels", "num_res_blocks", "transformer_depth", "context_dim")
        for name in counts:
            check(getattr(self, name) >= 1, f"denoiser.{name}", getattr(self, name), "1 or more")
        check(
            self.model_channels >= 32 and self.model_channels % 32 == 0,
            "denoiser.model_channels",
            self.model_channels,
            "a multiple of 32, for the 32 groups of the group norms",
        )
        check(
            len(self.channel_mult) >= 1 and all(m >= 1 for m in self.channel_mult),
            "denoiser.channel_mult",
            self.channel_mult,
            "at least one level, each 1 or more",
        )
        factors = [2**level for level in range(len(self.channel_mult))]
        check(
            set(self.attention_resolutions) <= set(factors),
            "denoiser.attention_resolutions",
            self.attention_resolutions,
            f"any of {', '.join(map(str, factors))}",
        )
        check(
            (self.num_heads is None) != (self.num_head_channels is None),
            "denoiser.num_heads",
            self.num_heads,
            f"a number, or null where denoiser.num_head_channels (now {self.num_head_channels!r}) is given",
        )
        attended = sorted(
            {
                mult * self.model_channels
                for factor, mult in zip(factors, self.channel_mult, strict=True)
                if factor in self.attention_resolutions or factor == factors[-1]
            }
        )
        for name in ("num_heads", "num_head_channels"):
            value = getattr(self, name)
            check(
                value is None or (value >= 1 and all(channels % value == 0 for channels in attended)),
                f"denoiser.{name}",
                value,
                f"a divisor of the channels of the attention levels ({', '.join(map(str, attended))})",
            )
        check(0.0 <= self.dropout < 1.0, "denoiser.dropout", self.dropout, "0 up to, but not including, 1")

    @property
    def downsampling(self) -> int:
        """Height and width of the latent must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)

    def heads(self, channels: int) -> int:
        """Attention heads of a level that has `channels` channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        assert self.num_heads is not None  # __post_init__ holds that one of the two is given
        return self.num_heads
