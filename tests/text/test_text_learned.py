import subprocess
import sys
import zlib

import pytest
import torch

from t2i.config import TextConfig
from t2i.text import build_text_encoder
from t2i.text.learned import TRIGRAM_ROWS, WORD_ROWS, LearnedTextEncoder, word_rows

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def encoder() -> LearnedTextEncoder:
    torch.manual_seed(0)
    return build_text_encoder(TextConfig(name="learned", max_tokens=8, width=32, depth=2, heads=4))


def test_a_caption_is_a_start_token_and_its_words(encoder):
    features = encoder(["A red-hot Stove!", "", "one two three four five six seven eight nine"])
    assert encoder.split("A red-hot Stove!") == ["a", "red", "-", "hot", "stove", "!"]
    assert features.mask.sum(1).tolist() == [7, 1, 8]
    assert features.tokens.shape == (3, 8, encoder.token_dim)
    assert features.pooled.shape == (3, encoder.pooled_dim)
    assert (features.tokens[~features.mask] == 0).all()
    for tokens, pooled, mask in zip(features.tokens, features.pooled, features.mask, strict=True):
        torch.testing.assert_close(pooled, tokens[mask].mean(0))


@pytest.mark.parametrize("captions", [[""], ["", ""], ["   "]])
def test_captions_without_words(encoder, captions):
    features = encoder(captions)
    assert features.mask.sum(1).tolist() == [1] * len(captions)
    features.pooled[:, 0].sum().backward()
    assert encoder.start.grad.abs().sum() > 0


def test_rows_are_the_checksums_of_the_words_bytes():
    word, trigrams = word_rows("öl")
    assert word == zlib.crc32(b"<\xc3\xb6l>") % WORD_ROWS
    wanted = [b"<\xc3\xb6", b"\xc3\xb6l", b"\xb6l>"]
    assert trigrams == tuple(zlib.crc32(trigram) % TRIGRAM_ROWS for trigram in wanted)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_same_rows_in_every_process(hash_seed):
    code = "from t2i.text.learned import word_rows; print([word_rows(w) for w in ('cat', 'a', '!', 'öl')])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str([word_rows(w) for w in ("cat", "a", "!", "öl")])


def test_a_misspelt_word_lies_near_its_kin(encoder):
    words = ["elephant", "elefant", "elephants", "zebra", "purple", "umbrella"]
    vectors = torch.nn.functional.normalize(encoder.embedding(words), dim=1)
    kin = vectors[0] @ vectors[1:].T
    assert kin[:2].min() > 0.3
    assert kin[2:].max() < kin[:2].min()


def test_the_order_of_words_matters(encoder):
    a, b = encoder(["red cube blue ball", "blue cube red ball"]).pooled
    assert (a - b).abs().max() > 1e-3


def test_a_caption_sees_neither_its_neighbours_nor_the_length_of_the_padding(encoder):
    captions = ["a cat", "", "two dogs and a bird in a tree", "x"]
    together = encoder(captions)
    longer = LearnedTextEncoder(20, 32, 2, 4)
    weights = encoder.state_dict()
    weights["position"] = torch.cat([weights["position"], torch.full((12, 32), 9.0)])
    longer.load_state_dict(weights)
    for i, caption in enumerate(captions):
        alone = encoder([caption])
        torch.testing.assert_close(alone.tokens[0], together.tokens[i], rtol=1e-9, atol=1e-9)
        if i != 2:  # which is cut at 8 tokens
            torch.testing.assert_close(longer([caption]).tokens[0, :8], alone.tokens[0], rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_parameter_and_only_the_rows_in_use(encoder):
    assert encoder.trainable
    captions = ["a red cube on a blue ball", "green"]
    features = encoder(captions)
    (features.tokens * torch.randn_like(features.tokens)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    rows = {word_rows(word)[0] for caption in captions for word in caption.split()}
    assert set(encoder.embedding.word.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()) == rows


def test_it_learns_which_colour_goes_with_which_shape(encoder):
    """Of two coloured shapes, the colour of the one that comes first in a list, in combinations held out."""
    colours, shapes = ["red", "green", "blue", "black"], ["cube", "ball", "star", "ring", "heart", "cone"]
    samples = [(a, s, b, t) for a in range(4) for s in range(6) for b in range(4) for t in range(6) if s != t]
    captions = [f"a {colours[a]} {shapes[s]} and a {colours[b]} {shapes[t]}" for a, s, b, t in samples]
    labels = torch.tensor([a if s < t else b for a, s, b, t in samples])
    generator = torch.Generator().manual_seed(0)
    training, held_out = torch.randperm(480, generator=generator).split([400, 80])
    reader = torch.nn.Linear(32, 4)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], 3e-3)

    def guess(indices):
        return reader(encoder([captions[i] for i in indices]).tokens[:, 0])

    for _ in range(100):
        indices = training[torch.randint(400, (64,), generator=generator)]
        loss = torch.nn.functional.cross_entropy(guess(indices), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = guess(held_out).argmax(1) == labels[held_out]
    assert right.float().mean() > 0.9  # either colour at random: about 0.6
