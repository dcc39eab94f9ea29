import pytest
import torch
from torch import nn

from t2i.interfaces import TextFeatures
from t2i.text.cache import CachedTextEncoder
from t2i.text.learned import LearnedTextEncoder


class Counting(nn.Module):
    """A frozen encoder that notes what it was asked."""

    token_dim, pooled_dim, max_tokens, trainable = 3, 2, 4, False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.asked: list[list[str]] = []

    def forward(self, captions):
        self.asked.append(list(captions))
        lengths = torch.tensor([len(caption) for caption in captions])
        tokens = lengths[:, None, None] * torch.arange(4.0)[:, None] * self.weight
        return TextFeatures(tokens, tokens[:, 1, :2], torch.arange(4) < lengths[:, None])


def same(a: TextFeatures, b: TextFeatures) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "pooled", "mask"))


def test_each_distinct_caption_is_encoded_once():
    encoder = Counting()
    cached = CachedTextEncoder(encoder, 100)
    for captions in (["a", "bb", "a"], ["bb", "ccc", "", "ccc"], ["a", ""]):
        assert same(cached(captions), Counting()(captions))
    assert encoder.asked == [["a", "bb"], ["ccc", ""]]
    assert len(cached) == 4
    assert (cached.token_dim, cached.pooled_dim, cached.max_tokens, cached.trainable) == (3, 2, 4, False)


def test_the_least_recently_used_caption_leaves_first():
    encoder = Counting()
    cached = CachedTextEncoder(encoder, 2)
    for caption in ("a", "bb", "a", "ccc", "a", "bb"):
        cached([caption])
    assert encoder.asked == [["a"], ["bb"], ["ccc"], ["bb"]]
    batch = ["a", "bb", "ccc", "dddd"]  # more than are kept
    assert same(cached(batch), Counting()(batch))
    assert len(cached) == 2


def test_what_is_kept_cannot_be_changed_from_outside():
    cached = CachedTextEncoder(Counting(), 10)
    cached(["abc"]).tokens.zero_()
    assert same(cached(["abc"]), Counting()(["abc"]))


def test_features_carry_no_graph_but_may_enter_one():
    features = CachedTextEncoder(Counting(), 10)(["a", "bb"])
    assert not features.tokens.requires_grad
    nn.Linear(3, 1)(features.tokens).sum().backward()


def test_the_encoder_is_no_part_of_the_module_that_holds_it():
    stage = nn.Module()
    stage.text = CachedTextEncoder(Counting(), 10)
    assert stage.state_dict() == {}
    assert list(stage.parameters()) == []


def test_it_moves_with_what_it_keeps():
    encoder = Counting()
    cached = CachedTextEncoder(encoder, 10)
    cached(["a"])
    assert cached.to("meta") is cached
    assert encoder.weight.is_meta
    assert cached(["a"]).tokens.is_meta
    assert len(encoder.asked) == 1


def test_an_encoder_that_learns_is_refused():
    with pytest.raises(ValueError, match="still learning"):
        CachedTextEncoder(LearnedTextEncoder(4, 8, 1, 2), 10)


def test_a_real_encoder_gives_the_same_bits_through_the_cache(clip_folder):
    from t2i.config import TextConfig
    from t2i.text import build_text_encoder

    encoder = build_text_encoder(TextConfig(name="clip", model=str(clip_folder)))
    cached = CachedTextEncoder(encoder, 100)
    captions = ["a cat", "", "two dogs", "a red cube"]
    assert same(cached(captions), encoder(captions))
    assert same(cached(captions), encoder(captions))
    assert same(cached(captions[::-1]), encoder(captions[::-1]))
