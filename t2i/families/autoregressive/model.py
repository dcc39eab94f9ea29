"""Codec, text encoder and transformer as one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i.codes.config import CodeSampling
from t2i.config import check
from t2i.families.autoregressive.config import Config
from t2i.families.autoregressive.drawing import draw_codes
from t2i.families.autoregressive.network import CodeTransformer
from t2i.families.autoregressive.palette import PaletteCodec
from t2i.families.autoregressive.words import TEXT_WEIGHT, WordNumbers, check_vocabulary
from t2i.families.codec import decoded_tokens, token_codec
from t2i.families.tokens import grid_of
from t2i.interfaces import Progress, SampleRequest, TextFeatures, TextToImage, TokenCodec
from t2i.nn.between import asked_text
from t2i.text import text_encoder_for_training


class Autoregressive(TextToImage):
    """codec: frozen here; its weights are part of the state dict, so that a checkpoint can be sampled from by itself. A
    frozen text encoder's weights are not: it is loaded from where the configuration says.

    size_px: of the pictures that it is trained on. Raises ConfigError where these are not whole codes
    """

    def __init__(self, config: Config, codec: TokenCodec, size_px: int) -> None:
        super().__init__()
        self.config = config
        self.codec = codec.eval().requires_grad_(False)
        config.sampling.check_codes(codec.num_codes)
        grid = grid_of(codec, size_px, size_px, ("resolution.size_px", "resolution.size_px"))
        if config.transformer.conditioning == "words":
            self.text = WordNumbers(config.text.max_tokens)
            check_vocabulary(config.transformer.vocabulary, self.text.num_words)
        else:
            self.text = text_encoder_for_training(config.text)
        self.transformer = CodeTransformer(
            config.transformer, codec.num_codes, grid, self.text.token_dim, config.text.max_tokens
        )

    def train(self, mode: bool = True) -> Autoregressive:
        super().train(mode)
        self.codec.eval()
        return self

    def losses(self, codes: Tensor, text: TextFeatures) -> dict[str, Tensor]:
        """codes: (B, h, w) -> "loss", the mean of -log p(code | text, codes before it) in nats; of one stream of words
        and codes their parts too, weighed as in DALL-E."""
        parts = self.transformer.losses(codes.flatten(1), text.tokens, text.mask)
        if "text" not in parts:
            return {"loss": parts["codes"]}
        loss = TEXT_WEIGHT * parts["text"] + (1 - TEXT_WEIGHT) * parts["codes"]
        return {"loss": loss, "loss_text": parts["text"], "loss_codes": parts["codes"]}

    def check(self, request: SampleRequest) -> None:
        """Raises ConfigError for all but pictures of whole codes, from a prompt alone."""
        grid_of(self.codec, request.height_px, request.width_px, ("height", "width"))
        allowed = "none with this model, which draws a picture's codes from the first to the last"
        for key in ("mask", "image", "noise"):
            check(getattr(request, key) is None, key, "given", allowed)
        check(not request.tile, "tile", request.tile, "none with this model")
        between = request.between
        check(between is None or between.seeds is None, "between", "two seeds", "two prompts with this model")
        words = self.config.transformer.conditioning == "words"
        check(not words or between is None, "between", "two prompts", "none with a model of words")

    @torch.no_grad()
    def generate(
        self, request: SampleRequest, sampling: CodeSampling, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, 3, height_px, width_px) in [-1, 1], NaN where the numbers were not finite, on the model's device; see
        `t2i.interfaces.Generator`."""
        self.check(request)
        sampling.check_codes(self.codec.num_codes)
        grid = grid_of(self.codec, request.height_px, request.width_px, ("height", "width"))
        text = asked_text(self.text, request)
        negative = None
        if sampling.guidance_scale != 1:
            negative = self.text([request.negative_prompt] * len(request.prompts))
        codes, finite = draw_codes(self.transformer, text, negative, grid, request.seeds, sampling, progress)
        image = decoded_tokens(self.codec, codes)
        finite &= image.isfinite().flatten(1).all(1)
        return torch.where(finite[:, None, None, None], image.clamp(-1, 1), torch.nan)


def build_codec(config: Config, values: Mapping[str, Any]) -> TokenCodec:
    """The palette, or a randomly initialised codec of the run whose configuration is `values`. Raises ConfigError where
    that has no codes."""
    if config.palette is not None:
        return PaletteCodec(config.palette)
    assert config.builds_on is not None
    return token_codec(values, config.builds_on.codec)
