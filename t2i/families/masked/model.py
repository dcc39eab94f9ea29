"""Text to pictures by masked modelling of codes: codec, text encoder and transformer as one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.codes.masked import Predict, decode, halton_order, masked_loss
from t2i.config import RunConfig, check
from t2i.data_config import BUCKETS
from t2i.diffusion.inpainting import coarse_mask, pasted
from t2i.families.codec import decoded_tokens, token_codec
from t2i.families.low_codes import CodesModel, check_between, check_low_request, with_low
from t2i.families.masked.config import Config, MaskGITConfig, MuseConfig, SamplingConfig
from t2i.families.masked.maskgit import MaskGIT
from t2i.families.masked.muse import Muse
from t2i.families.masked.network import MaskedTransformer
from t2i.families.masked.uvit import UVit
from t2i.families.tokens import grid_of
from t2i.interfaces import Progress, SampleRequest, TextFeatures, TokenCodec
from t2i.nn.between import asked_text
from t2i.nn.guidance import both_texts, guided
from t2i.nn.precision import widened
from t2i.nn.resize import smaller


class MaskedModel(CodesModel):
    """Whose codes are masks first, and then drawn all at once, more of them kept from step to step."""

    low: MaskedModel | None
    transformer: MaskedTransformer

    def __init__(
        self, config: Config, codec: TokenCodec, size_px: int, low: MaskedModel | None = None
    ) -> None:
        super().__init__(config, codec, size_px, low)
        check_sampling(config.sampling, codec.num_codes, self.shape)
        self.text = self.text_encoder(config.text)
        self.transformer = build_transformer(
            config, codec, self.shape, self.text.token_dim, self.text.pooled_dim
        )
        keys = ("resolution.size_px", "resolution.size_px")
        check_unit(self.transformer, self.shape, codec.downsampling, keys)

    def logits(self, codes: Tensor, hidden: Tensor, text: TextFeatures, low: Tensor | None = None) -> Tensor:
        """codes: (B, h, w) int64, of no meaning where hidden (B, h, w) is True; low: (B, h', w') int64, with
        super-resolution -> (B, h w, num_codes)."""
        tokens = torch.where(hidden, self.transformer.mask_token, codes)
        return self.transformer(tokens, text.tokens, text.mask, low, text.pooled)

    def loss(self, codes: Tensor, hidden: Tensor, text: TextFeatures, low: Tensor | None = None) -> Tensor:
        """-> (B,): of the hidden codes alone, given the others; arguments as in `logits`."""
        logits = self.logits(codes, hidden, text, low)
        return masked_loss(logits, codes.flatten(1), hidden.flatten(1), self.config.label_smoothing)

    @torch.no_grad()
    def generate(
        self, request: SampleRequest, sampling: SamplingConfig, progress: Progress | None = None
    ) -> Tensor:
        """-> (N, 3, height_px, width_px) in [-1, 1], NaN where the model's numbers were not finite, on the model's
        device; see `t2i.interfaces.Generator`. With a picture, a share `strength` of its codes, or of those that the
        mask touches, is drawn anew; what the mask leaves is copied from the picture."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        codes, finite = self.drawn_codes(request, sampling, generators, progress)
        drawn = decoded_tokens(self.codec, codes)
        finite &= drawn.isfinite().flatten(1).all(1)
        drawn = torch.where(finite[:, None, None, None], drawn.clamp(-1, 1), torch.nan)
        if request.mask is None or request.image is None:
            return drawn
        return pasted(drawn, request.image.to(drawn), request.mask.to(drawn))

    def drawn_codes(
        self,
        request: SampleRequest,
        sampling: SamplingConfig,
        generators: Sequence[torch.Generator],
        progress: Progress | None,
    ) -> tuple[Tensor, Tensor]:
        """-> (N, h, w) int64, and (N,) bool: whether all numbers on the way were finite. With super-resolution the
        codes at the lower resolution are drawn first, as their run's own `sampling` says."""
        self.check(request, sampling)
        shape = grid_of(self.codec, request.height_px, request.width_px, ("height", "width"))
        device = self.device
        low = None
        finite = torch.ones(len(request.prompts), dtype=torch.bool, device=device)
        if self.low is not None:
            small = resized(request, self.size_px // self.low.size_px)
            low, finite = self.low.drawn_codes(small, self.low.config.sampling, generators, progress)
        codes = torch.zeros(len(request.prompts), *shape, dtype=torch.int64, device=device)
        unknown = torch.ones_like(codes, dtype=torch.bool)
        if request.image is not None:
            codes = self.codec.tokens(request.image.to(device))
        if request.mask is not None:
            unknown = coarse_mask(request.mask.to(device), self.codec.downsampling)[:, 0].bool()
        drawn = decode(
            self.predictor(request, sampling, shape, low, finite),
            codes.flatten(1),
            unknown.flatten(1),
            sampling.steps,
            generators,
            sampling,
            sampling.choice_temperature,
            order=halton_order(*shape) if sampling.order == "halton" else None,
            strength=1.0 if request.image is None else request.strength,
            noise_per=sampling.noise_per,
            progress=progress,
        )
        return drawn.unflatten(1, shape), finite

    def predictor(
        self,
        request: SampleRequest,
        sampling: SamplingConfig,
        shape: tuple[int, int],
        low: Tensor | None,
        finite: Tensor,
    ) -> Predict:
        """Guided logits for the request: negative + scale (prompt - negative). finite: (N,) bool, set to False where
        logits are not."""
        text, guides = asked_text(self.text, request), sampling.guidance_scale != 1
        if guides:
            text = both_texts(self.text([request.negative_prompt] * len(text)), text)

        def twice(x: Tensor) -> Tensor:
            return torch.cat([x, x]) if guides else x

        seen_low = None if low is None else twice(low)

        def predict(codes: Tensor, unknown: Tensor, share: float) -> Tensor:
            codes, unknown = (twice(x.unflatten(1, shape)) for x in (codes, unknown))
            logits = self.logits(codes, unknown, text, seen_low)
            if guides:
                without, with_prompt = widened(logits).chunk(2)
                grown = share if sampling.guidance_schedule == "linear" else 1.0
                logits = guided(with_prompt, without, 1 + grown * (sampling.guidance_scale - 1))
            finite.logical_and_(logits.isfinite().flatten(1).all(1))
            return logits

        return predict

    def check(self, request: SampleRequest, sampling: SamplingConfig) -> None:
        """Raises ConfigError for sizes that the transformer does not take, what only models with noise, or without
        positions, can do, and more steps or codes than there are."""
        f = self.codec.downsampling
        shape = grid_of(self.codec, request.height_px, request.width_px, ("height", "width"))
        check_unit(self.transformer, shape, f, ("height", "width"))
        if not self.transformer.takes_any_shape:
            for key, found, own in zip(("height", "width"), shape, self.shape, strict=True):
                allowed = f"{own * f} with this model, whose positions are those of its training size"
                check(found == own, key, found * f, allowed)
        check(request.noise is None, "noise", "given", "none with this model, which starts from masks")
        check_between(request)
        check(not request.tile, "tile", request.tile, "none with this model, whose network knows its place")
        check_sampling(sampling, self.codec.num_codes, shape)
        if self.low is not None:
            factor = self.size_px // self.low.size_px
            unit = factor * self.low.codec.downsampling
            for key in ("height", "width"):
                side = getattr(request, f"{key}_px")
                check(
                    side % unit == 0,
                    key,
                    side,
                    f"multiples of {unit}, the pixels of a code at the lower resolution",
                )
            check_low_request(request, self.low, (request.height_px // factor, request.width_px // factor))

    def check_buckets(self, step_px: int) -> None:
        """Raises ConfigError where training pictures with sides that are multiples of `step_px` are not its own."""
        square = self.low is not None or not self.transformer.takes_any_shape
        check(not square, BUCKETS, step_px, "null with this model, whose grid of codes is square")
        keys = (BUCKETS, BUCKETS)
        check_unit(
            self.transformer, grid_of(self.codec, step_px, step_px, keys), self.codec.downsampling, keys
        )

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device


def check_sampling(sampling: SamplingConfig, num_codes: int, shape: tuple[int, int]) -> None:
    """Raises ConfigError for options that do not fit the codebook, or (h, w) codes of a picture."""
    sampling.check_codes(num_codes)
    count = shape[0] * shape[1]
    check(
        sampling.steps <= count, "sampling.steps", sampling.steps, f"at most {count}, the codes of a picture"
    )


def check_unit(
    transformer: MaskedTransformer, shape: tuple[int, int], downsampling: int, keys: tuple[str, str]
) -> None:
    """Raises ConfigError, with these keys, for (h, w) codes that are not whole tokens of the transformer."""
    unit = transformer.unit
    for key, codes in zip(keys, shape, strict=True):
        check(
            codes % unit == 0,
            key,
            codes * downsampling,
            f"multiples of {unit * downsampling} with this model",
        )


def resized(request: SampleRequest, factor: int) -> SampleRequest:
    """The same of pictures so many times smaller; what a mask touches there it still touches."""
    size = request.height_px // factor, request.width_px // factor
    image, mask = request.image, request.mask
    return dataclasses.replace(
        request,
        height_px=size[0],
        width_px=size[1],
        image=None if image is None else smaller(image, size),
        mask=None if mask is None else F.adaptive_max_pool2d(mask, size),
    )


def build_transformer(
    config: Config, codec: TokenCodec, shape: tuple[int, int], context_dim: int, pooled_dim: int
) -> MaskedTransformer:
    """The network that the configuration names, for a text encoder's widths. Raises ConfigError."""
    network, num_codes = config.transformer, codec.num_codes
    if isinstance(network, MaskGITConfig):
        return MaskGIT(network, num_codes, shape, context_dim)
    if isinstance(network, MuseConfig):
        code_dim = codec.code_vectors().shape[1]
        return Muse(network, num_codes, shape, context_dim, config.low, code_dim)
    least = num_codes + 1
    ok = network.vocabulary is None or network.vocabulary >= least
    check(
        ok, "transformer.vocabulary", network.vocabulary, f"{least} or more, the codes and the mask, or null"
    )
    return UVit(network, num_codes, context_dim, pooled_dim, codec.downsampling)


def model_of(run: RunConfig, extra: Mapping[str, Any]) -> MaskedModel:
    """See `t2i.families.low_codes.with_low`."""
    return with_low(run, extra, made)


def made(run: RunConfig, extra: Mapping[str, Any], low: MaskedModel | None) -> MaskedModel:
    config = run.model
    assert isinstance(config, Config)
    codec = token_codec(extra["codec"], config.builds_on.codec)
    return MaskedModel(config, codec, run.resolution.size_px, low)
