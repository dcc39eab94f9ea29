"""Text to pictures by masked modelling of codes: codec, text encoder and transformer as one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i.codes.masked import Predict, decode, halton_order, masked_loss
from t2i.codes.sampling import guided_logits
from t2i.config import check
from t2i.diffusion.inpainting import coarse_mask, pasted
from t2i.families.codec import token_codec
from t2i.families.masked.config import Config, MaskGITConfig, SamplingConfig
from t2i.families.masked.maskgit import MaskGIT
from t2i.families.masked.muse import Muse
from t2i.families.masked.network import MaskedTransformer
from t2i.families.tokens import grid_of
from t2i.interfaces import Progress, SampleRequest, TextFeatures, TextToImage, TokenCodec
from t2i.nn.between import asked_text
from t2i.text import text_encoder_for_training


class MaskedModel(TextToImage):
    """codec: an `nn.Module` that is a `t2i.interfaces.TokenCodec`, frozen here; its weights are part of the state dict,
    so that a checkpoint can be sampled from by itself. A frozen text encoder's weights are not.

    size_px: side of the pictures that it is trained on
    """

    def __init__(self, config: Config, codec: TokenCodec, size_px: int) -> None:
        super().__init__()
        self.config = config
        self.codec = codec.eval().requires_grad_(False)
        self.text = text_encoder_for_training(config.text)
        self.shape = grid_of(codec, size_px, size_px, ("resolution.size_px", "resolution.size_px"))
        self.transformer = build_transformer(config, codec.num_codes, self.shape, self.text.token_dim)

    def train(self, mode: bool = True) -> MaskedModel:
        super().train(mode)
        self.codec.eval()
        return self

    def logits(self, codes: Tensor, hidden: Tensor, text: TextFeatures) -> Tensor:
        """codes: (B, h, w) int64, of no meaning where hidden (B, h, w) is True -> (B, h w, num_codes)."""
        tokens = torch.where(hidden, self.codec.num_codes, codes)
        return self.transformer(tokens, text.tokens, text.mask)

    def loss(self, codes: Tensor, hidden: Tensor, text: TextFeatures) -> Tensor:
        """-> (B,): of the hidden codes alone, given the others; codes and hidden as in `logits`."""
        logits = self.logits(codes, hidden, text)
        return masked_loss(logits, codes.flatten(1), hidden.flatten(1), self.config.label_smoothing)

    @torch.no_grad()
    def generate(
        self, request: SampleRequest, sampling: SamplingConfig, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, 3, height_px, width_px) in [-1, 1], NaN where the model's numbers were not finite, on the model's
        device; see `t2i.interfaces.Generator`. With a picture, a share `strength` of its codes, or of those that the
        mask touches, is drawn anew; what the mask leaves is copied from the picture."""
        shape = self.asked_shape(request)
        sampling.check_codes(self.codec.num_codes)
        count = shape[0] * shape[1]
        check(
            sampling.steps <= count,
            "sampling.steps",
            sampling.steps,
            f"at most {count}, the codes of a picture",
        )
        check(request.noise is None, "noise", "given", "none with this model, which starts from masks")
        between = request.between
        ok = between is None or between.seeds is None
        check(
            ok, "between.seeds", "given", "none with this model, whose pictures have no noise to lie between"
        )
        check(not request.tile, "tile", request.tile, "none with this model, whose network knows its place")
        codes = torch.zeros(len(request.prompts), *shape, dtype=torch.int64, device=self.device)
        unknown = torch.ones_like(codes, dtype=torch.bool)
        if request.image is not None:
            codes = self.codec.tokens(request.image.to(self.device))
        if request.mask is not None:
            unknown = coarse_mask(request.mask.to(self.device), self.codec.downsampling)[:, 0].bool()
        finite = torch.ones(len(codes), dtype=torch.bool, device=self.device)
        drawn_codes = decode(
            self.predictor(request, sampling, shape, finite),
            codes.flatten(1),
            unknown.flatten(1),
            sampling.steps,
            [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
            sampling,
            sampling.choice_temperature,
            order=halton_order(*shape) if sampling.order == "halton" else None,
            strength=1.0 if request.image is None else request.strength,
            progress=progress,
        )
        drawn = self.codec.decode_tokens(drawn_codes.unflatten(1, shape))
        finite &= drawn.isfinite().flatten(1).all(1)
        drawn = torch.where(finite[:, None, None, None], drawn.clamp(-1, 1), torch.nan)
        if request.mask is None or request.image is None:
            return drawn
        return pasted(drawn, request.image.to(drawn), request.mask.to(drawn))

    def predictor(
        self, request: SampleRequest, sampling: SamplingConfig, shape: tuple[int, int], finite: Tensor
    ) -> Predict:
        """Guided logits for the request: negative + scale (prompt - negative). finite: (N,) bool, set to False where
        logits are not."""
        text, guides = asked_text(self.text, request), sampling.guidance_scale != 1
        if guides:
            negative = self.text([request.negative_prompt] * len(text))
            pairs = ((getattr(negative, f.name), getattr(text, f.name)) for f in dataclasses.fields(text))
            text = TextFeatures(*(torch.cat(pair) for pair in pairs))

        def predict(codes: Tensor, unknown: Tensor, share: float) -> Tensor:
            codes, unknown = codes.unflatten(1, shape), unknown.unflatten(1, shape)
            if not guides:
                logits = self.logits(codes, unknown, text)
            else:
                both = self.logits(torch.cat([codes, codes]), torch.cat([unknown, unknown]), text)
                without, with_prompt = both.chunk(2)
                grown = share if sampling.guidance_schedule == "linear" else 1.0
                logits = guided_logits(with_prompt, without, 1 + grown * (sampling.guidance_scale - 1))
            finite.logical_and_(logits.isfinite().flatten(1).all(1))
            return logits

        return predict

    def asked_shape(self, request: SampleRequest) -> tuple[int, int]:
        """(h, w) of the request's codes. Raises ConfigError for a size that this model does not draw."""
        f = self.codec.downsampling
        shape = grid_of(self.codec, request.height_px, request.width_px, ("height", "width"))
        if getattr(self.config.transformer, "positions", "learned") == "learned":
            for key, found, own in zip(("height", "width"), shape, self.shape, strict=True):
                allowed = f"{own * f} with this model, whose positions are those of its training size"
                check(found == own, key, found * f, allowed)
        return shape

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device


def build_transformer(
    config: Config, num_codes: int, shape: tuple[int, int], context_dim: int
) -> MaskedTransformer:
    """The network that the configuration names."""
    kind = MaskGIT if isinstance(config.transformer, MaskGITConfig) else Muse
    return kind(config.transformer, num_codes, shape, context_dim)  # type: ignore[arg-type]


def build_model(config: Config, codec_config: Mapping[str, Any], size_px: int) -> MaskedModel:
    """The model with a randomly initialised codec of the family and shape that `codec_config` (the top-level mapping of
    the codec's run) says. Raises ConfigError where that gives no codes."""
    return MaskedModel(config, token_codec(codec_config, config.builds_on.codec), size_px)
