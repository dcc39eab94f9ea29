"""What the shapes of UNets have in common; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from t2i.config import check


@dataclass(frozen=True)
class UNetShape:
    """model_channels: what channel_mult multiplies
    channel_mult: channels of each level, as multiples of model_channels; each level halves height and width
    num_res_blocks: residual blocks per level on the way down; the way up has one more
    attention_resolutions: downsampling factors (1, 2, 4, ...) whose levels have attention; the middle block always
        has it
    num_heads, num_head_channels: exactly one of them is given, the other follows from the level's channels
    """

    model_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int | None = None
    num_head_channels: int | None = None

    def __post_init__(self) -> None:
        check(bool(self.channel_mult), "denoiser.channel_mult", [], "at least one level")
        check(self.num_res_blocks >= 1, "denoiser.num_res_blocks", self.num_res_blocks, "1 or more")
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

    def channels(self) -> list[int]:
        """Of each level."""
        return [int(m * self.model_channels) for m in self.channel_mult]

    def heads(self, channels: int) -> int:
        """Attention heads of a level that has `channels` channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        assert self.num_heads is not None  # __post_init__ holds that one of the two is given
        return self.num_heads
