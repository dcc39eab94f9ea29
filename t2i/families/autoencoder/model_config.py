"""Configuration of the convolutional encoder and decoder; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from t2i.config import check


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Shape of the LDM autoencoder (Rombach et al., 2112.10752, appendix; Esser et al., 2012.09841, table 7).

    base_channels: width at full resolution, a multiple of 8
    channel_mult: width at each resolution, in units of base_channels; each entry after the first halves
        the sides, so the downsampling factor is 2^(len(channel_mult) - 1)
    num_res_blocks: residual blocks per resolution (the decoder has one more)
    attention_resolutions: sides in pixels, for pictures of resolution_px, at which every residual block
        is followed by attention
    mid_attention: whether the lowest resolution has an attention in the middle (aMUSEd's, 2401.01808, has none)
    resolution_px: side of the training pictures; used only to place attention, the network is convolutional
    latent_channels: channels that the decoder reads
    dropout: probability, in the residual blocks
    unit_range: within the networks pictures are in [0, 1], as aMUSEd's are, and not in [-1, 1]
    decoder_base_channels, decoder_res_blocks: as base_channels and num_res_blocks, of a decoder that is wider or deeper
        than the encoder; null: as the encoder's. Muse's has 256 and 4 beside 128 and 2 (2301.00704, appendix)
    """

    base_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    resolution_px: int
    latent_channels: int
    dropout: float = 0.0
    mid_attention: bool = True
    unit_range: bool = False
    decoder_base_channels: int | None = None
    decoder_res_blocks: int | None = None

    def __post_init__(self) -> None:
        for key in ("base_channels", "decoder_base_channels"):
            base = getattr(self, key)
            check(base is None or (base >= 8 and base % 8 == 0), f"backbone.{key}", base, "a multiple of 8")
        mult = self.channel_mult
        check(len(mult) >= 1 and min(mult) >= 1, "backbone.channel_mult", mult, "whole numbers of 1 or more")
        for key in ("num_res_blocks", "decoder_res_blocks"):
            blocks = getattr(self, key)
            check(blocks is None or blocks >= 1, f"backbone.{key}", blocks, "1 or more")
        f = self.downsampling
        ok = self.resolution_px >= f and self.resolution_px % f == 0
        check(
            ok, "backbone.resolution_px", self.resolution_px, f"a multiple of the downsampling factor ({f})"
        )
        sides = [self.resolution_px >> level for level in range(len(mult))]
        for side in self.attention_resolutions:
            check(side in sides, "backbone.attention_resolutions", side, ", ".join(map(str, sides)))
        check(self.latent_channels >= 1, "backbone.latent_channels", self.latent_channels, "1 or more")
        check(0 <= self.dropout < 1, "backbone.dropout", self.dropout, "0 up to, not including, 1")

    @property
    def downsampling(self) -> int:
        """Pixels of the picture per latent position along each side."""
        return 1 << (len(self.channel_mult) - 1)
