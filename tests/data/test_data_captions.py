import json

import numpy as np
import pytest

from t2i.data.captions import choose_caption, parse_captions, parse_metadata
from t2i.data.decode import BadSample
from t2i.data.order import Stream, uniform


def captions(members, keys=("txt", "json:caption")):
    return parse_captions(members, parse_metadata(members, "k"), keys, "k")


def as_json(**fields) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("members", "keys", "found"),
    [
        ({"txt": b" a dog\n", "json": as_json(caption="b")}, ("txt", "json:caption"), ["a dog"]),
        ({"txt": b"a", "json": as_json(caption="b")}, ("json:caption", "txt"), ["b"]),
        ({"txt": b" \n", "json": as_json(caption="b")}, ("txt", "json:caption"), ["b"]),
        ({"txt": b"a", "json": as_json(other=1)}, ("json:caption", "txt"), ["a"]),
        ({"txt": b"a", "json": as_json(caption=None)}, ("json:caption", "txt"), ["a"]),
        ({"json": as_json(caption=["b", "", " c "])}, ("txt", "json:caption"), ["b", "c"]),
        ({"txt": "köter 🐕".encode()}, ("txt",), ["köter 🐕"]),
        ({"txt": "a dog\n".encode("utf-8-sig")}, ("txt",), ["a dog"]),
        ({"json": b"\xef\xbb\xbf" + as_json(caption="b")}, ("json:caption",), ["b"]),
        ({"json": as_json(caption=["\ufeff b", "\ufeff"])}, ("json:caption",), ["b"]),
    ],
)
def test_the_first_key_with_a_caption_is_taken(members, keys, found):
    assert list(captions(members, keys)) == found


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({}, "caption"),
        ({"txt": b""}, "caption"),
        ({"txt": b"\xff\xfe"}, "caption"),
        ({"json": as_json(caption=3)}, "caption"),
        ({"json": as_json(caption=["a", 3])}, "caption"),
        ({"txt": b"a", "json": b"{"}, "json"),
        ({"txt": b"a", "json": b""}, "json"),
        ({"txt": b"a", "json": b"[]"}, "json"),
        ({"txt": b"a", "json": b'{"a": "\xff"}'}, "json"),
        ({"txt": b"a", "json": b"[" * 100_000}, "json"),
    ],
)
def test_bad_captions_have_their_cause(members, cause):
    with pytest.raises(BadSample) as error:
        captions(members)
    assert error.value.cause == cause


def test_dropout_and_choice_have_the_rates_they_should():
    samples = np.arange(10_000)
    chances = uniform(0, Stream.DROPOUT, 0, samples)
    choices = uniform(0, Stream.CAPTION, 0, samples)
    options = {"a": 1.0, "b": 1.0, "c": 1.0}
    for dropout in (0.0, 0.1, 1.0):
        chosen = [choose_caption(options, u, v, dropout) for u, v in zip(choices, chances, strict=True)]
        bound = 4 * np.sqrt(10_000 * dropout * (1 - dropout))
        assert abs(chosen.count("") - 10_000 * dropout) <= bound
        kept = 10_000 - chosen.count("")
        for option in options:
            assert abs(chosen.count(option) - kept / 3) <= 4 * np.sqrt(kept * 2 / 9)
