"""Pictures that are much longer than wide: what is cut off is not computed, and what shows nothing is counted."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from data_configs import data_config
from data_samples import encode, good_members, noise
from hypothesis import given
from hypothesis import strategies as st
from open_shards import take
from PIL import Image

from t2i.data import decode
from t2i.data.decode import (
    MAX_ASPECT,
    MAX_SURPLUS,
    BadSample,
    covering_size,
    decode_image,
    resize,
    resize_and_crop,
    stored_size,
)
from t2i.data.index import ShardIndex
from t2i.generation.text_to_image import read_image
from t2i_pipelines.inspecting.facts import look_at
from t2i_pipelines.pictures import prepare


def cut_afterwards(pixels: np.ndarray, size_px: tuple[int, int], corner: tuple[int, int]) -> np.ndarray:
    """The whole picture resized, then cut: what memory allows for small ones only."""
    covering = covering_size(pixels.shape[:2], size_px)
    (top, left), whole = corner, resize(Image.fromarray(pixels), covering)
    return whole[:, top : top + size_px[0], left : left + size_px[1]].numpy()


places = st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2) | st.none()


@given(st.integers(1, 40), st.integers(1, 1500), st.booleans(), st.integers(1, 48), places)
def test_a_part_is_what_is_cut_from_the_whole(short, long, upright, side, place):
    # No overshoot: it is cut off between rows and columns, in either order.
    size = (long, short) if upright else (short, long)
    pixels = 90 + noise(0, *size) // 4
    found, corner = resize_and_crop(Image.fromarray(pixels), size, (side, side), place)
    assert found.shape == (3, side, side)
    assert found.dtype == torch.uint8
    wanted = cut_afterwards(pixels, (side, side), corner)
    covering = covering_size(size, (side, side))
    if covering[0] * covering[1] <= MAX_SURPLUS * side * side:
        np.testing.assert_array_equal(found.numpy(), wanted)  # of ordinary pictures to the last bit
    else:
        np.testing.assert_allclose(found.numpy().astype(int), wanted.astype(int), atol=2)


@pytest.mark.parametrize("size", [(64, 640), (640, 64), (30, 700)])
def test_contrasts_too_and_of_a_scaled_decoding(size):
    pixels = noise(1, *size)
    found, corner = resize_and_crop(Image.fromarray(pixels), size, (48, 48), (0.4, 0.7))
    difference = np.abs(found.numpy().astype(int) - cut_afterwards(pixels, (48, 48), corner).astype(int))
    assert difference.mean() < 1
    assert np.quantile(difference, 0.99) <= 3
    half = Image.fromarray(pixels).resize((size[1] // 2, size[0] // 2), Image.Resampling.BOX)
    found, corner = resize_and_crop(half, size, (16, 16), (0.4, 0.7))
    whole = resize(half, covering_size(size, (16, 16)))
    wanted = whole[:, corner[0] : corner[0] + 16, corner[1] : corner[1] + 16]
    assert (found.int() - wanted.int()).abs().float().mean() < 1


def test_of_a_long_picture_only_the_crop_is_computed(monkeypatch):
    asked = []
    monkeypatch.setattr(decode, "resize", lambda image, size_px: asked.append(size_px))
    picture, _ = resize_and_crop(Image.new("RGB", (65_500, 1)), (1, 65_500), (512, 512))
    assert picture.shape == (3, 512, 512)
    assert asked == []


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 65_500), (2, 201)])
def test_a_strip_counts_under_its_own_cause(size, write_tar, tmp_path):
    strip = encode(np.full((*size, 3), 200, np.uint8))
    for read in (decode_image, stored_size, prepare):
        with pytest.raises(BadSample) as error:
            read(strip, "k")
        assert error.value.cause == "aspect"
        assert f"{size[1]} x {size[0]} pixels" in str(error.value)
    path = write_tar("00000.tar", {"0": good_members(0), "1": {"png": strip, "txt": b"a strip"}})
    data = data_config(shards=str(path), max_bad_share=1.0)
    (batch,) = take(data, 1, batch_size=2, size_px=256)
    assert batch.bad == {"aspect": 1}
    facts, _ = look_at(path, "00000", ShardIndex.scan(path), True, {0, 1}, 64)
    assert facts.causes == {"strip, far longer than wide": 1}


def test_the_longest_that_is_let_through_is_read_everywhere(tmp_path):
    size = (3, 3 * MAX_ASPECT)
    pixels = np.full((*size, 3), 200, np.uint8)
    (tmp_path / "long.png").write_bytes(encode(pixels))
    started = read_image(tmp_path / "long.png", (256, 256))
    assert started.shape == (3, 256, 256)
    assert (started - (200 / 127.5 - 1)).abs().max() < 0.01
    image, original = decode_image(encode(pixels), "k", (512, 512))
    assert resize_and_crop(image, original, (512, 512))[0].unique().tolist() == [200]
    made = prepare(encode(pixels), "k", 2)
    with Image.open(io.BytesIO(made.image or b"")) as reduced:
        assert reduced.size == (2 * MAX_ASPECT, 2)
