"""What each kind of model of codes learns: nothing of codes that are chance, and sixteen pictures by heart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from grey_codec import GreyCodec
from torch import Tensor

from t2i.codes.masked import random_mask
from t2i.families.autoregressive.model import Autoregressive
from t2i.families.low_codes import CodesModel
from t2i.families.masked.model import MaskedModel
from t2i.interfaces import SampleRequest

AR, MASKED = "experiment=autoregressive/tiny_ar", "experiment=masked/tiny_masked"
LOW = ("low.num_codes=5", "low.side=2")
KINDS = {
    "ar": [AR, "transformer.code_vectors=false"],
    "ar, codes by their vectors": [AR],
    "parti": ["experiment=autoregressive/tiny_parti", "transformer.attention=full"],
    "DALL-E": [
        *(AR, "text=minilm", "text.max_tokens=8", "transformer.conditioning=words"),
        "transformer.attention=axial",
    ],
    "ar_sr": [AR, "stage=ar_sr", *LOW],
    "Muse": [MASKED],
    "MaskGIT": [MASKED, "transformer=maskgit", "transformer.dropout=0.0"],
    "U-ViT": [
        *(MASKED, "transformer=uvit", "transformer.hidden=64", "transformer.channels=16"),
        *("transformer.conv_blocks=1", "transformer.conv_heads=2", "transformer.embedding_dim=16"),
    ],
    "masked_sr": [MASKED, "stage=masked_sr", *LOW, "low.depth=1"],
}
NUM_CODES, SIDE = 5, 4
WORDS = ("red", "blue", "green", "black")
CAPTIONS = [f"a {one} star and a {other} circle" for one in WORDS for other in WORDS]


@pytest.fixture
def model_of(compose_run) -> Callable[[str], CodesModel]:
    def built(size_px: int, low: CodesModel | None, *arguments: str) -> CodesModel:
        is_masked = arguments[0] == MASKED
        plain = ["label_smoothing=0.0"] if is_masked else []
        config = compose_run(*arguments, *plain, f"resolution.size_px={size_px}").model
        kind = MaskedModel if is_masked else Autoregressive
        return kind(config, GreyCodec(NUM_CODES, 8), size_px, low)

    def model_of(name: str) -> CodesModel:
        torch.manual_seed(0)
        low = built(16, None, KINDS[name][0]) if "_sr" in name else None
        return built(8 * SIDE, low, *KINDS[name])

    return model_of


def chance(number: int, side: int = SIDE) -> Tensor:
    return torch.randint(NUM_CODES, (number, side, side))


def loss_of(
    model: CodesModel, codes: Tensor, captions: list[str], low: Tensor, all_hidden: bool = False
) -> Tensor:
    """Of the codes; of a masked model that of hidden ones, by chance or all."""
    text, given = model.text(captions), low if model.low is not None else None
    if isinstance(model, Autoregressive):
        losses = model.losses(codes, text, given)
        return losses.get("loss_codes", losses["loss"])
    number = len(codes)
    ratio = torch.zeros(number) if all_hidden else torch.rand(number)
    hidden = random_mask(ratio, torch.rand(number, SIDE**2)).view_as(codes)
    return model.loss(codes, hidden, text, given).mean()


def learn(model: CodesModel, steps: int, batch: Callable[[], tuple[Tensor, list[str], Tensor]]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model.train(), *batch()).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@pytest.mark.parametrize("name", KINDS)
def test_of_uniform_codes_nothing_can_be_known(name, model_of):
    """The loss is log(num_codes), and no less after training: no code is told by what a model is shown beside it."""
    model, number = model_of(name), 32
    learn(model, 40, lambda: (chance(number), CAPTIONS * 2, chance(number, 2)))
    with torch.no_grad():
        loss = loss_of(model, chance(256), CAPTIONS * 16, chance(256, 2)).item()
    assert loss == pytest.approx(math.log(NUM_CODES), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_sixteen_pictures_are_learned_by_heart(name, model_of):
    """Each by its caption: below 0.05 nats a code, and drawn as they were."""
    model = model_of(name)
    codes, low = chance(16), chance(16, 2)
    learn(model, 300 if isinstance(model, Autoregressive) else 1500, lambda: (codes, CAPTIONS, low))
    with torch.no_grad():
        assert loss_of(model, codes, CAPTIONS, low, all_hidden=True) < 0.05
    if model.low is not None:  # which would draw others
        model.low.drawn_codes = lambda *_: (low, torch.ones(16, dtype=torch.bool))
    likely = dataclasses.replace(model.config.sampling, temperature=0.0, guidance_scale=1.0)
    drawn = model.generate(SampleRequest.of_size(CAPTIONS, 8 * SIDE), likely)
    right = model.codec.tokens(drawn) == codes
    assert right.flatten(1).all(1).sum() >= 15
