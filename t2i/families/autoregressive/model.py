"""Codec, text encoder and transformer as one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2i.codes.config import CodeSampling
from t2i.config import RunConfig, check
from t2i.families.autoregressive.config import Config
from t2i.families.autoregressive.drawing import draw_codes
from t2i.families.autoregressive.network import CodeTransformer
from t2i.families.autoregressive.palette import PaletteCodec
from t2i.families.autoregressive.words import TEXT_WEIGHT, WordNumbers, check_vocabulary
from t2i.families.codec import decoded_tokens, token_codec
from t2i.families.low_codes import CodesModel, check_between, check_low_request, with_low
from t2i.families.tokens import grid_of
from t2i.interfaces import Progress, SampleRequest, TextFeatures, TokenCodec
from t2i.nn.between import asked_text


class Autoregressive(CodesModel):
    """Whose codes are drawn one after the other."""

    low: Autoregressive | None
    transformer: CodeTransformer

    def __init__(
        self, config: Config, codec: TokenCodec, size_px: int, low: Autoregressive | None = None
    ) -> None:
        super().__init__(config, codec, size_px, low)
        config.sampling.check_codes(codec.num_codes)
        if config.transformer.conditioning == "words":
            self.text = WordNumbers(config.text.max_tokens)
            check_vocabulary(config.transformer.vocabulary, self.text.num_words)
        else:
            self.text = self.text_encoder(config.text)
        self.transformer = CodeTransformer(
            config.transformer,
            codec.num_codes,
            self.shape,
            self.text.token_dim,
            config.text.max_tokens,
            config.low,
            codec.code_vectors().shape[1],
        )

    def losses(self, codes: Tensor, text: TextFeatures, low: Tensor | None = None) -> dict[str, Tensor]:
        """codes: (B, h, w); low: (B, h', w'), with super-resolution -> "loss", the mean of -log p(code | text, low,
        codes before it) in nats; of one stream of words and codes their parts too, weighed as in DALL-E."""
        parts = self.transformer.losses(codes.flatten(1), text.tokens, text.mask, low)
        if "text" not in parts:
            return {"loss": parts["codes"]}
        loss = TEXT_WEIGHT * parts["text"] + (1 - TEXT_WEIGHT) * parts["codes"]
        return {"loss": loss, "loss_text": parts["text"], "loss_codes": parts["codes"]}

    def check(self, request: SampleRequest, sampling: CodeSampling) -> None:
        """Raises ConfigError for all but pictures of whole codes, of super-resolution those of its own size, from a
        prompt alone, and for more codes than there are."""
        sampling.check_codes(self.codec.num_codes)
        sides = request.height_px, request.width_px
        grid_of(self.codec, *sides, ("height", "width"))
        for key, side in zip(("height", "width"), sides, strict=True):
            ok = self.low is None or side == self.size_px
            check(ok, key, side, f"{self.size_px} with this model of super-resolution")
        allowed = "none with this model, which draws a picture's codes from the first to the last"
        for key in ("mask", "image", "noise"):
            check(getattr(request, key) is None, key, "given", allowed)
        check(not request.tile, "tile", request.tile, "none with this model")
        words = self.config.transformer.conditioning == "words"
        allowed = "none with this model: nothing lies between two words, or two choices of a code"
        check(not words or request.between is None, "between", "given", allowed)
        check_between(request)
        if self.low is not None:
            check_low_request(request, self.low, (self.low.size_px, self.low.size_px))

    @torch.no_grad()
    def generate(
        self, request: SampleRequest, sampling: CodeSampling, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, 3, height_px, width_px) in [-1, 1], NaN where the numbers were not finite, on the model's device; see
        `t2i.interfaces.Generator`."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        codes, finite = self.drawn_codes(request, sampling, generators, progress)
        image = decoded_tokens(self.codec, codes)
        finite &= image.isfinite().flatten(1).all(1)
        return torch.where(finite[:, None, None, None], image.clamp(-1, 1), torch.nan)

    def drawn_codes(
        self,
        request: SampleRequest,
        sampling: CodeSampling,
        generators: Sequence[torch.Generator],
        progress: Progress | None,
    ) -> tuple[Tensor, Tensor]:
        """As `draw_codes` gives them. With super-resolution the codes at the lower resolution are drawn first, as their
        run's own `sampling` says."""
        self.check(request, sampling)
        low, finite = None, torch.ones(len(request.prompts), dtype=torch.bool)
        if self.low is not None:
            size = self.low.size_px
            small = dataclasses.replace(request, height_px=size, width_px=size)
            low, finite = self.low.drawn_codes(small, self.low.config.sampling, generators, progress)
        grid = grid_of(self.codec, request.height_px, request.width_px, ("height", "width"))
        text = asked_text(self.text, request)
        negative = None
        if sampling.guidance_scale != 1:
            negative = self.text([request.negative_prompt] * len(request.prompts))
        codes, own = draw_codes(self.transformer, text, negative, grid, generators, sampling, progress, low)
        return codes, finite.to(own.device) & own


def model_of(run: RunConfig, extra: Mapping[str, Any]) -> Autoregressive:
    """See `t2i.families.low_codes.with_low`."""
    return with_low(run, extra, made)


def made(run: RunConfig, extra: Mapping[str, Any], low: Autoregressive | None) -> Autoregressive:
    config = run.model
    assert isinstance(config, Config)
    codec = build_codec(config, extra["codec"])
    return Autoregressive(config, codec, run.resolution.size_px, low)


def build_codec(config: Config, values: Mapping[str, Any]) -> TokenCodec:
    """The palette, or a randomly initialised codec of the run whose configuration is `values`. Raises ConfigError where
    that has no codes."""
    if config.palette is not None:
        return PaletteCodec(config.palette)
    assert config.builds_on is not None
    return token_codec(values, config.builds_on.codec)
