"""Masked models over a codec whose codes are known: losses, drawing, painting in, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from grey_codec import GreyCodec

from t2i.config import TextConfig
from t2i.errors import ConfigError
from t2i.families.masked.config import (
    CodesBuildsOn,
    Config,
    MaskGITConfig,
    MuseConfig,
    SamplingConfig,
    UVitConfig,
)
from t2i.families.masked.model import MaskedModel
from t2i.interfaces import SampleRequest

MUSE = MuseConfig(
    width=32, depth=2, heads=2, positions="rotary", norm="rms", bias=False, qk_norm=True, dropout=0.0
)
MASKGIT = MaskGITConfig("maskgit", 32, 2, 2, 0.0)
UVIT = UVitConfig("uvit", 32, 1, 2, 32, 16, 1, 2, 8)
SAMPLING = SamplingConfig(
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    guidance_scale=1.0,
    steps=4,
    guidance_schedule="constant",
    choice_temperature=1.0,
    order="confidence",
)
TEXT = TextConfig("learned", max_tokens=8, width=16, depth=1, heads=2)
PROMPTS = ["a red circle", "a blue star", "two green squares"]


def model_of(transformer=MUSE, label_smoothing=0.0, sampling=SAMPLING) -> MaskedModel:
    torch.manual_seed(0)
    config = Config(CodesBuildsOn("grey"), transformer, TEXT, sampling, label_smoothing)
    return MaskedModel(config, GreyCodec(), 32).eval()


def asked(**changes) -> SampleRequest:
    return SampleRequest(
        **({"prompts": PROMPTS, "seeds": [3, 4, 5], "height_px": 32, "width_px": 32} | changes)
    )


@pytest.fixture
def painted():
    """Of codes drawn at random, so that the codec gives them back."""
    torch.manual_seed(1)
    return GreyCodec().decode_tokens(torch.randint(5, (3, 4, 4)))


def test_the_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_codes(float64):
    model = model_of()
    torch.nn.init.zeros_(model.transformer.to_logits.weight)
    codes, hidden = torch.randint(5, (3, 4, 4)), torch.rand(3, 4, 4) < 0.5
    loss = model.loss(codes, hidden, model.text(PROMPTS))
    torch.testing.assert_close(loss, torch.full((3,), math.log(5)))


@pytest.mark.parametrize("transformer", [MUSE, MASKGIT, UVIT], ids=["muse", "maskgit", "uvit"])
def test_codes_beneath_the_mask_do_not_reach_the_network(transformer, float64):
    model = model_of(transformer)
    codes, hidden = torch.randint(5, (3, 4, 4)), torch.rand(3, 4, 4) < 0.5
    text = model.text(PROMPTS)
    logits = model.logits(codes, hidden, text)
    permuted = codes.clone()
    permuted[hidden] = codes[hidden].flip(0)
    assert not torch.equal(permuted, codes)
    assert torch.equal(model.logits(permuted, hidden, text), logits)
    shown = codes.clone()
    shown[~hidden] = (codes[~hidden] + 1) % 5
    assert not torch.allclose(model.logits(shown, hidden, text), logits)
    # The mask is a token of its own: none of the codes says the same.
    for code in range(5):
        assert not torch.allclose(
            model.logits(torch.full_like(codes, code), torch.zeros_like(hidden), text),
            model.logits(codes, torch.ones_like(hidden), text),
        )


def test_guidance_is_on_the_logits_and_1_is_the_prompt_alone(float64):
    model = model_of()
    codes, unknown = torch.randint(5, (3, 16)), torch.rand(3, 16) < 0.5
    finite = torch.ones(3, dtype=torch.bool)

    def logits(share=0.0, negative="", **changes):
        sampling = dataclasses.replace(SAMPLING, **changes)
        request = asked(negative_prompt=negative)
        return model.predictor(request, sampling, (4, 4), None, finite)(codes, unknown, share)

    shaped = codes.view(3, 4, 4), unknown.view(3, 4, 4)
    with_prompt = model.logits(*shaped, model.text(PROMPTS))
    for negative in ("", "a yellow ring"):
        without = model.logits(*shaped, model.text([negative] * 3))
        torch.testing.assert_close(logits(negative=negative), with_prompt)
        wanted = without + 3 * (with_prompt - without)
        torch.testing.assert_close(logits(negative=negative, guidance_scale=3.0), wanted)
        grows = {"guidance_scale": 3.0, "guidance_schedule": "linear", "negative": negative}
        torch.testing.assert_close(logits(0.0, **grows), with_prompt)
        torch.testing.assert_close(logits(0.5, **grows), without + 2 * (with_prompt - without))
        torch.testing.assert_close(logits(1.0, **grows), wanted)


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_a_picture_depends_neither_on_the_batch_nor_on_the_others_seeds(order, float64):
    model, sampling = model_of(), dataclasses.replace(SAMPLING, order=order, guidance_scale=2.0)
    images = model.generate(asked(), sampling)
    assert images.shape == (3, 3, 32, 32)
    for i in range(3):
        alone = model.generate(asked().rows([i]), sampling)
        assert torch.equal(alone[0], images[i])
    assert not torch.equal(model.generate(asked(seeds=[6, 4, 5]), sampling)[0], images[0])
    assert model.generate(asked(width_px=48), sampling).shape == (3, 3, 32, 48)


def test_painting_in_keeps_what_the_mask_leaves(painted, float64):
    """To the pixel; and what is drawn over is the codes that the mask touches."""
    model = model_of()
    mask = torch.zeros(3, 1, 32, 32)
    mask[:, :, 4:20, 12:30] = 1  # no whole codes: it touches those of rows 0 to 2 and columns 1 to 3
    seen = []
    predict = model.logits
    model.logits = lambda codes, hidden, text, low: (
        seen.append((codes, hidden)),
        predict(codes, hidden, text),
    )[1]
    drawn = model.generate(asked(image=painted, mask=mask, strength=1.0), SAMPLING)
    touched = torch.zeros(3, 4, 4, dtype=torch.bool)
    touched[:, :3, 1:] = True
    assert torch.equal(seen[0][1], touched)
    assert all(torch.equal(codes[~touched], model.codec.tokens(painted)[~touched]) for codes, _ in seen)
    assert torch.equal(drawn[mask.expand_as(drawn) == 0], painted.double()[mask.expand_as(drawn) == 0])
    assert (drawn != painted).any()


def test_strength_decides_how_much_of_a_picture_is_drawn_anew(painted, float64):
    model, changed = model_of(), {}
    for strength in (0.25, 0.5, 1.0):
        codes = model.codec.tokens(model.generate(asked(image=painted, strength=strength), SAMPLING))
        changed[strength] = (codes != model.codec.tokens(painted)).double().mean().item()
    assert 0 < changed[0.25] < changed[0.5] < changed[1.0]
    anew = model.generate(asked(image=painted, strength=1.0), SAMPLING)
    assert torch.equal(anew, model.generate(asked(), SAMPLING))  # nothing of it is left


def test_what_is_not_finite_is_told_apart_from_the_others(float64):
    model = model_of()
    with torch.no_grad():
        model.transformer.places.embedding.weight[4] = torch.nan
    painted = GreyCodec().decode_tokens(torch.tensor([0, 4])[:, None, None].expand(2, 4, 4))
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., :8] = 1
    request = asked(prompts=PROMPTS[:2], seeds=[1, 2], image=painted, mask=mask)
    model.codec.greys[4] = 0.81
    drawn = model.generate(request, dataclasses.replace(SAMPLING, steps=1))
    assert drawn[0].isfinite().all()
    assert drawn[1][:, :, :8].isnan().all()


@pytest.mark.parametrize(
    ("request_changes", "sampling_changes", "sentence"),
    [
        ({}, {"steps": 17}, "sampling.steps is 17; allowed: at most 16, the codes of a picture"),
        ({}, {"top_k": 6}, "sampling.top_k is 6; allowed: at most 5"),
        ({"width_px": 36}, {}, "width is 36; allowed: multiples of 8"),
        ({"noise": torch.zeros(3, 1)}, {}, "noise is 'given'; allowed: none with this model"),
        ({"tile": "x"}, {}, "tile is 'x'; allowed: none with this model"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(request_changes, sampling_changes, sentence):
    sampling = dataclasses.replace(SAMPLING, **sampling_changes)
    with pytest.raises(ConfigError, match=sentence):
        model_of().check(asked(**request_changes), sampling)
    if sampling_changes:  # before anything is trained
        with pytest.raises(ConfigError, match=sentence):
            model_of(sampling=sampling)


def test_learned_positions_draw_their_own_size_alone():
    model = model_of(MASKGIT)
    with pytest.raises(ConfigError, match="width is 48; allowed: 32 with this model"):
        model.generate(asked(width_px=48), SAMPLING)


def test_a_transformer_at_half_the_resolution_takes_pairs_of_codes():
    small = dataclasses.replace(UVIT, downsample=True)
    model = model_of(small)
    assert model.generate(asked(width_px=48), SAMPLING).shape == (3, 3, 32, 48)
    with pytest.raises(ConfigError, match="width is 40; allowed: multiples of 16 with this model"):
        model.generate(asked(width_px=40), SAMPLING)
    with pytest.raises(ConfigError, match=r"transformer.vocabulary is 5; allowed: 6 or more"):
        model_of(dataclasses.replace(small, vocabulary=5))
