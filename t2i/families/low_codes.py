"""Super-resolution of codes: a model is given, beside the caption, those that another draws at a lower resolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from t2i.config import RunConfig, TextConfig, check, parse_run
from t2i.errors import ConfigError
from t2i.families.builds_on import CodesBuildsOn, LowConfig
from t2i.families.tokens import codes_feature, grid_of, smallest_integer
from t2i.interfaces import Batch, Feature, SampleRequest, TextEncoder, TextToImage, TokenCodec
from t2i.nn.resize import smaller
from t2i.text import text_encoder_for_training

M = TypeVar("M", bound="CodesModel")


class CodesModel(TextToImage):
    """What draws the codes of a picture, and the codec that they are of.

    config: has `text`, and with `low` the entries `builds_on` and `low`
    codec: frozen here; its weights are part of the state dict, so that a checkpoint can be sampled from by itself. A
        frozen text encoder's weights are not: it is loaded from where the configuration says
    size_px: side of the pictures that it is trained on. Raises ConfigError where these are not whole codes
    low: of super-resolution, the whole model whose codes it is given; frozen, and part of the state dict too
    transformer: made by each family
    """

    transformer: nn.Module

    def __init__(self, config: Any, codec: TokenCodec, size_px: int, low: CodesModel | None = None) -> None:
        super().__init__()
        self.config, self.size_px = config, size_px
        self.codec = codec.eval().requires_grad_(False)
        self.shape = grid_of(codec, size_px, size_px, ("resolution.size_px", "resolution.size_px"))
        self.low = None if low is None else low.eval().requires_grad_(False)
        if low is not None:
            check_low(config.low, config.builds_on, self, low)

    def text_encoder(self, config: TextConfig) -> TextEncoder:
        """The lower run's, where that is frozen and the same."""
        low = self.low
        if low is not None and low.config.text == config and not isinstance(low.text, nn.Module):
            return low.text
        return text_encoder_for_training(config)

    def train(self, mode: bool = True) -> CodesModel:
        super().train(mode)
        self.codec.eval()
        if self.low is not None:
            self.low.eval()
        return self


def with_low(
    run: RunConfig, extra: Mapping[str, Any], made: Callable[[RunConfig, Mapping[str, Any], M | None], M]
) -> M:
    """The model of a run, randomly initialised, and within it the one at a lower resolution. Raises ConfigError.

    extra: what the run's checkpoints have beside the configuration: "codec", the top-level mapping of the codec's run,
        and with super-resolution "low", "config" and "extra" of the run at the lower resolution
    made: the model of a run, given that at the lower resolution
    """
    config: Any = run.model
    low = None
    if config.low is not None:
        low = with_low(parse_run(extra["low"]["config"], type(config)), extra["low"]["extra"], made)
    return made(run, extra, low)


def check_low(config: LowConfig, builds_on: CodesBuildsOn, high: CodesModel, low: CodesModel) -> None:
    """Raises ConfigError where the codes of `low` are not those that super-resolution is configured for."""
    place = f"with builds_on.low={builds_on.low}"
    check(low.low is None, "builds_on.low", builds_on.low, "a run that builds on no lower one itself")
    ok = config.num_codes == low.codec.num_codes
    check(ok, "low.num_codes", config.num_codes, f"{low.codec.num_codes} {place}")
    side, own = low.shape[0], high.shape[0]
    check(config.side == side, "low.side", config.side, f"{side} {place}")
    ok = own > side and own % side == 0 and high.size_px % low.size_px == 0
    allowed = f"sizes whose codes ({own} a side) are a multiple of {side} {place}"
    check(ok, "resolution.size_px", high.size_px, allowed)


def check_between(request: SampleRequest) -> None:
    """Raises ConfigError for pictures between two seeds: what a model of codes draws is chosen, and not added up."""
    ok = request.between is None or request.between.seeds is None
    check(ok, "between", "two seeds", "two prompts with one seed with this model")


def check_low_request(request: SampleRequest, low: Any, size_px: tuple[int, int]) -> None:
    """Raises ConfigError where `low`, the model at the lower resolution, cannot draw what the request asks of it.

    size_px: (H, W) that it is asked for
    """
    small = dataclasses.replace(request, height_px=size_px[0], width_px=size_px[1], image=None, mask=None)
    try:
        low.check(small, low.config.sampling)
    except ConfigError as error:
        raise ConfigError(f"The run at the lower resolution, which draws first: {error}") from None


@torch.no_grad()
def low_codes(image: Tensor, low: CodesModel) -> Tensor:
    """(B, 3, H, W) -> (B, h', w') int64 of the pictures at the size of `low`."""
    return low.codec.tokens(smaller(image, (low.size_px, low.size_px)))


def low_codes_of(batch: Batch, low: CodesModel | None) -> Tensor | None:
    """(B, h', w') int64 of the batch's pictures, computed ahead or now; None without `low`."""
    if low is None:
        return None
    codes = batch.features.get("low_codes")
    return low_codes(batch.image, low) if codes is None else codes.long()


def low_feature(low: CodesModel | None, made_by: str | None) -> Mapping[str, Feature]:
    """What a stage's `features` says of them, as `codes_feature` does of its own."""
    if low is None:
        return {}
    dtype = smallest_integer(low.codec.num_codes)
    feature = dataclasses.replace(
        codes_feature(low.codec, str(made_by))["codes"],
        tensors=("low_codes",),
        make=lambda image: {"low_codes": low_codes(image, low).to(dtype)},
    )
    return {"low_codes": feature}
