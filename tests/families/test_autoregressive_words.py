"""One stream of words and codes, as in DALL-E."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from t2i.errors import ConfigError
from t2i.families.autoencoder.codec import from_checkpoint
from t2i.families.autoregressive.model import Autoregressive
from t2i.families.autoregressive.network import CodeTransformer
from t2i.families.autoregressive.words import WordNumbers, WordPrefix
from t2i.interfaces import Between, SampleRequest
from t2i_cli.composition import composed_run

CAPTIONS = ("a red circle", "", "a large blue star in the top left")
WORDS = (
    "experiment=autoregressive/tiny_ar",
    "text=minilm",
    "text.max_tokens=8",
    "transformer.conditioning=words",
)


@pytest.fixture
def model(compose_run) -> Autoregressive:
    torch.manual_seed(0)
    codec = from_checkpoint(composed_run(["experiment=autoencoder/tiny_vq"]))
    return Autoregressive(compose_run(*WORDS).model, codec, 32)


def test_the_words_are_berts():
    found = WordNumbers(8)(CAPTIONS)
    assert found.tokens[0, :5, 0].tolist() == [101, 1037, 2417, 4418, 102]
    assert found.mask.sum(1).tolist() == [5, 2, 8]


def test_the_loss_weighs_text_and_codes_one_to_seven(model, float64):
    model = model.double()
    torch.nn.init.normal_(model.transformer.head.weight, std=0.1)
    codes, text = torch.randint(64, (3, 8, 8)), model.text(CAPTIONS)
    losses = model.losses(codes, text)
    torch.testing.assert_close(losses["loss"], (losses["loss_text"] + 7 * losses["loss_codes"]) / 8)
    # The same, by the whole stream as one would write it down.
    transformer = model.transformer
    flat, places = codes.flatten(1), torch.arange(64)
    slots = transformer.slots(flat[:, :-1], text.tokens, text.mask, places)
    states = transformer.norm(transformer.states(slots, places, 0, None))
    of_words, of_codes = [], []
    assert isinstance(transformer.text, WordPrefix)
    for picture in range(3):
        told = int(text.mask[picture].sum())
        logits = transformer.text.head(states[picture, : told - 1])
        of_words.append(F.cross_entropy(logits, text.tokens[picture, 1:told, 0].long()))
        of_codes.append(F.cross_entropy(transformer.head(states[picture, 8:]), flat[picture]))
    torch.testing.assert_close(losses["loss_text"], torch.stack(of_words).mean())
    torch.testing.assert_close(losses["loss_codes"], torch.stack(of_codes).mean())


def test_no_word_is_told_by_a_later_one_or_by_a_code(model, float64):
    transformer = model.double().transformer
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text, codes = model.text(CAPTIONS[2:]), torch.randint(64, (1, 63))
    slots = transformer.slots(codes, text.tokens, text.mask, torch.arange(64)).detach().requires_grad_()
    states = transformer.states(slots, torch.arange(64), 0, None)
    for slot in (0, 3, 7):
        (gradient,) = torch.autograd.grad(states[0, slot].square().sum(), slots, retain_graph=True)
        assert (gradient[0, slot + 1 :] == 0).all()
        assert (gradient[0, : slot + 1].abs().amax(1) > 0).all()


def test_draws(model):
    request = SampleRequest(CAPTIONS, [0, 1, 2], 32, 32)
    images = model.eval().generate(request, dataclasses.replace(model.config.sampling, guidance_scale=2.0))
    assert images.shape == (3, 3, 32, 32)
    with pytest.raises(
        ConfigError, match="between is 'given'; allowed: none with this model: nothing lies between two words"
    ):
        model.check(
            dataclasses.replace(request, between=Between([0.5] * 3, prompts=CAPTIONS)), model.config.sampling
        )


def test_too_few_words(compose_run, model):
    config = compose_run(*WORDS, "transformer.vocabulary=16384").model
    with pytest.raises(ConfigError, match=r"transformer.vocabulary is 16384; allowed: 30,522 or more"):
        Autoregressive(config, model.codec, 32)
    with pytest.raises(ConfigError, match=r"text.name is 'learned'; allowed: minilm"):
        compose_run("experiment=autoregressive/tiny_ar", "transformer.conditioning=words")


def test_the_size_of_dall_e(compose_run):
    """12 billion, as its title says; blocks of 12 width^2 weights are nearly all."""
    config = compose_run("experiment=dalle/12b").model
    with torch.device("meta"):
        network = CodeTransformer(config.transformer, 8192, (32, 32), 1, 256)
    count = sum(p.numel() for p in network.parameters())
    assert math.isclose(count, 64 * 12 * 3968**2, rel_tol=0.03)
    assert round(count / 1e9) == 12
