import numpy as np
import pytest
import torch
from torch import nn

from t2i.interfaces import TextFeatures
from t2i.text.cache import MIN_MEASURED, CachedTextEncoder
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
        device = self.weight.device
        lengths = torch.tensor([len(caption) for caption in captions], device=device)
        places = torch.arange(4.0, device=device)
        tokens = lengths[:, None, None] * places[:, None] * self.weight
        return TextFeatures(tokens, tokens[:, 1, :2], places < lengths[:, None])


def same(a: TextFeatures, b: TextFeatures) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "pooled", "mask"))


def test_each_distinct_caption_is_encoded_once():
    encoder = Counting()
    cached = CachedTextEncoder(encoder)
    for captions in (["a", "bb", "a"], ["bb", "ccc", "", "ccc"], ["a", ""]):
        assert same(cached(captions), Counting()(captions))
    assert encoder.asked == [["a", "bb"], ["ccc", ""]]
    assert len(cached) == 4
    assert (cached.token_dim, cached.pooled_dim, cached.max_tokens, cached.trainable) == (3, 2, 4, False)


ROW_BYTES = 4 * 3 * 4 + 2 * 4 + 4  # of the features of Counting: tokens, pooled and mask


def test_the_least_recently_used_caption_leaves_first():
    encoder = Counting()
    cached = CachedTextEncoder(encoder, 2 * ROW_BYTES + 1)
    for caption in ("a", "bb", "a", "ccc", "a", "bb"):
        cached([caption])
    assert encoder.asked == [["a"], ["bb"], ["ccc"], ["bb"]]
    batch = ["a", "bb", "ccc", "dddd"]  # more than are kept
    assert same(cached(batch), Counting()(batch))
    assert len(cached) == 2


@pytest.mark.parametrize("max_bytes", [0, ROW_BYTES - 1, ROW_BYTES, 5 * ROW_BYTES])
def test_what_is_kept_stays_within_its_bytes(max_bytes):
    cached = CachedTextEncoder(Counting(), max_bytes)
    for batch in (["a", "bb"], ["ccc", "", "a"], ["dddd" * 3] * 2, [str(i) for i in range(12)], ["a", "11"]):
        assert same(cached(batch), Counting()(batch))
        slabs = [] if cached._kept is None else cached._kept._slabs
        assert sum(tensor.nbytes for slab in slabs for tensor in slab) <= max_bytes
        assert len(cached) <= max_bytes // ROW_BYTES
    assert len(cached) == max_bytes // ROW_BYTES


def test_memory_is_taken_as_it_is_needed(monkeypatch):
    monkeypatch.setattr("t2i.text.cache.SLAB_BYTES", 3 * ROW_BYTES)
    encoder = Counting()
    cached = CachedTextEncoder(encoder, 8 * ROW_BYTES)
    captions = ["x" * length for length in range(7)]
    for caption, slabs in zip(captions, (1, 1, 1, 2, 2, 2, 2), strict=True):
        cached([caption])
        assert len(cached._kept._slabs) == slabs
    assert same(cached(captions[1:]), Counting()(captions[1:]))
    assert len(encoder.asked) == 7


def test_where_captions_hardly_repeat_nothing_is_kept_any_more():
    encoder = Counting()
    cached = CachedTextEncoder(encoder, 50 * ROW_BYTES)
    for number in range(2000):  # the empty one is no reason to keep the others
        cached([f"{number}:{i}" for i in range(20)] + [""] * 3)
        if cached._off:
            break
    assert number * 20 < 50 + MIN_MEASURED + 40
    assert len(cached) == 0
    assert cached._kept is None
    batch = ["a", "", "a", "bb", ""]
    assert same(cached(batch), Counting()(batch))
    assert encoder.asked[-1] == ["a", "", "bb"]  # still each but once in a batch
    cached(batch)
    assert len(cached) == 0


def test_where_captions_repeat_they_stay():
    """Also where fewer are kept than there are, and in a first epoch, in which nothing can come again."""
    cached = CachedTextEncoder(Counting(), 300 * ROW_BYTES)
    random = np.random.default_rng(0)
    for _ in range(400):
        cached([str(number) for number in random.integers(0, 1000, 20)])
    assert len(cached) == 300
    few = CachedTextEncoder(Counting(), 3000 * ROW_BYTES)
    for first in range(0, 2900, 20):
        few([str(number) for number in range(first, first + 20)])
    assert len(few) == 2900


def test_what_is_kept_cannot_be_changed_from_outside():
    cached = CachedTextEncoder(Counting())
    cached(["abc"]).tokens.zero_()
    assert same(cached(["abc"]), Counting()(["abc"]))


def test_features_carry_no_graph_but_may_enter_one():
    features = CachedTextEncoder(Counting())(["a", "bb"])
    assert not features.tokens.requires_grad
    nn.Linear(3, 1)(features.tokens).sum().backward()


def test_the_encoder_is_no_part_of_the_module_that_holds_it():
    stage = nn.Module()
    stage.text = CachedTextEncoder(Counting())
    assert stage.state_dict() == {}
    assert list(stage.parameters()) == []


def test_what_was_computed_elsewhere_or_otherwise_is_forgotten():
    encoder = Counting()
    cached = CachedTextEncoder(encoder)
    cached(["a"])
    assert cached.to("cpu", torch.float64) is cached
    assert cached(["a"]).tokens.dtype == torch.float64
    assert encoder.asked == [["a"]] * 2
    cached.to("meta")
    assert encoder.weight.is_meta
    assert len(cached) == 0


def test_features_of_another_shape_or_type_are_not_mixed_with_what_is_kept():
    encoder = Counting()
    cached = CachedTextEncoder(encoder)
    cached(["a", "bb"])
    encoder.double()
    assert cached(["ccc"]).tokens.dtype == torch.float64
    assert len(cached) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_on_a_gpu_features_are_kept_in_page_locked_memory_of_the_host():
    encoder = Counting()
    cached = CachedTextEncoder(encoder).to("cuda")
    captions = ["x" * length for length in range(50)]
    for batch in (captions[:30], captions[20:], captions[::-1], captions * 3):
        found = cached(batch)
        assert found.tokens.is_cuda
        assert same(found, Counting().cuda()(batch).to("cuda"))
    assert len(encoder.asked) == 2
    assert all(tensor.is_pinned() for slab in cached._kept._slabs for tensor in slab)


def test_an_encoder_that_learns_is_refused():
    with pytest.raises(ValueError, match="still learning"):
        CachedTextEncoder(LearnedTextEncoder(4, 8, 1, 2))


def test_a_real_encoder_gives_the_same_bits_through_the_cache(clip_folder):
    from t2i.config import TextConfig
    from t2i.text import build_text_encoder

    encoder = build_text_encoder(TextConfig(name="clip", model=str(clip_folder), max_tokens=77))
    cached = CachedTextEncoder(encoder)
    captions = ["a cat", "", "two dogs", "a red cube"]
    assert same(cached(captions), encoder(captions))
    assert same(cached(captions), encoder(captions))
    assert same(cached(captions[::-1]), encoder(captions[::-1]))
