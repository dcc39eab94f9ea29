"""Colours of pictures with an ICC profile, against the arithmetic of the profile's own numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest
from data_configs import data_config
from data_samples import good_members, noise
from hypothesis import given
from hypothesis import strategies as st
from icc_profiles import DISPLAY_P3, SRGB, SRGB_CURVE, cmyk_profile, grey_profile, rgb_profile, saved
from open_shards import take
from PIL import Image

from t2i.data.decode import decode_image
from t2i_pipelines.pictures import prepare

P3 = rgb_profile(DISPLAY_P3)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def decode(data: bytes, size_px=None) -> np.ndarray:
    image, _ = decode_image(data, "k", size_px)
    assert image.mode == "RGB"
    assert "icc_profile" not in image.info
    return np.asarray(image)


def linear(levels: np.ndarray) -> np.ndarray:
    gamma, a, b, c, d = SRGB_CURVE
    x = levels / 255
    return np.where(x >= d, (a * x + b) ** gamma, c * x)


def in_srgb(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def p3_to_srgb(pixels: np.ndarray) -> np.ndarray:
    between = np.linalg.solve(np.array(SRGB).T, np.array(DISPLAY_P3).T)
    return in_srgb(linear(pixels) @ between.T)


def test_display_p3_becomes_srgb():
    data = saved(Image.new("RGB", (16, 16), (230, 60, 40)), "PNG", icc_profile=P3)
    np.testing.assert_allclose(decode(data)[0, 0], (250, 31, 13), atol=1)
    jpeg = saved(
        Image.new("RGB", (64, 64), (230, 60, 40)), "JPEG", quality=100, subsampling=0, icc_profile=P3
    )
    np.testing.assert_allclose(decode(jpeg)[0, 0], (250, 31, 13), atol=4)
    np.testing.assert_allclose(decode(jpeg, (8, 8))[0, 0], (250, 31, 13), atol=4)  # of a scaled decoding


@pytest.mark.parametrize("format", sorted(LOSSLESS))
def test_every_colour_is_where_the_profile_says(format):
    pixels = noise(0, 40, 50)
    data = saved(Image.fromarray(pixels), format, icc_profile=P3, **LOSSLESS[format])
    # Where a dark channel is left over from large ones, eight bits of a curve that steep are some levels.
    difference = np.abs(decode(data) - p3_to_srgb(pixels))
    assert np.quantile(difference, 0.99) <= 1.5
    assert difference.max() <= 6


def test_of_a_palette_and_with_transparency():
    colours = np.array([(230, 60, 40), (20, 120, 90), (250, 250, 250)], np.uint8)
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette(colours.tobytes())
    np.testing.assert_allclose(
        decode(saved(palette, "PNG", icc_profile=P3))[0], p3_to_srgb(colours), atol=1.5
    )
    alpha = np.array([[0, 128, 255]], np.uint8)
    rgba = Image.fromarray(np.dstack([colours[None], alpha]))
    share = alpha[0, :, None] / 255
    wanted = p3_to_srgb(colours) * share + 255 * (1 - share)  # on a white of sRGB
    np.testing.assert_allclose(decode(saved(rgba, "PNG", icc_profile=P3))[0], wanted, atol=2)
    grey = Image.fromarray(np.dstack([colours[None, :, 0], alpha]), "LA")
    wanted = in_srgb((colours[:, :1] / 255.0) ** 1.5) * share + 255 * (1 - share)
    found = decode(saved(grey, "PNG", icc_profile=grey_profile(1.5)))[0]
    np.testing.assert_allclose(found, np.broadcast_to(wanted, (3, 3)), atol=2)


def test_of_grey_pictures():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = decode(saved(Image.fromarray(levels), "PNG", icc_profile=grey_profile(1.5)))
    wanted = in_srgb((levels / 255) ** 1.5)[..., None].repeat(3, 2)
    np.testing.assert_allclose(found, wanted, atol=2.5)
    sixteen_bits = Image.fromarray(levels.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode(saved(sixteen_bits, "PNG", icc_profile=grey_profile(1.5))), found)
    # An RGB profile says what is grey, too.
    found = decode(saved(Image.fromarray(levels), "PNG", icc_profile=rgb_profile(SRGB, (1.5,))))
    np.testing.assert_allclose(found, wanted, atol=2.5)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_of_cmyk_pictures(format):
    """The profile's cyan is printed in green, which no conversion without it would know."""
    for inks, wanted in [
        ((255, 0, 0, 0), (0, 128, 0)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0,) * 4, (255,) * 3),
    ]:
        options = {"quality": 100} if format == "JPEG" else {}
        data = saved(Image.new("CMYK", (16, 16), inks), format, icc_profile=cmyk_profile(), **options)
        np.testing.assert_allclose(decode(data), np.broadcast_to(wanted, (16, 16, 3)), atol=4)


BROKEN = {
    "bytes": b"not a profile",
    "cut": P3[:200],
    "headless": P3[:36] + bytes(4) + P3[40:],
    "of another kind": cmyk_profile(),
    "of grey": grey_profile(1.5),
    "all black": rgb_profile(((0, 0, 0),) * 3),
    "upside down": rgb_profile(tuple(tuple(-x for x in p) for p in SRGB)),
    "huge": P3 + bytes(5 << 20),
}


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_a_broken_or_absurd_profile_is_as_none(kind):
    pixels = noise(0, 20, 30)
    for format in ("TIFF", "WEBP") if len(BROKEN[kind]) < 1 << 20 else ("TIFF",):
        data = saved(Image.fromarray(pixels), format, icc_profile=BROKEN[kind], **LOSSLESS[format])
        assert len(data) > len(BROKEN[kind])
        np.testing.assert_array_equal(decode(data), pixels)


def test_without_a_profile_or_with_that_of_srgb_pixels_stay_as_they_are():
    pixels = noise(0, 20, 30)
    for profile in (None, rgb_profile(SRGB)):
        np.testing.assert_array_equal(
            decode(saved(Image.fromarray(pixels), "PNG", icc_profile=profile)), pixels
        )


@given(st.data())
def test_a_profile_with_changed_bytes_never_loses_the_picture(data):
    made = bytearray(data.draw(st.sampled_from([P3, cmyk_profile(), grey_profile(2.2)])))
    for _ in range(data.draw(st.integers(1, 6))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    mode = data.draw(st.sampled_from(["RGB", "L", "CMYK", "P"]))
    picture = saved(Image.fromarray(noise(1, 5, 6)).convert(mode), "TIFF", icc_profile=bytes(made))
    assert decode(picture).shape == (5, 6, 3)


def test_training_sees_srgb(write_tar):
    picture = saved(Image.new("RGB", (16, 16), (230, 60, 40)), "PNG", icc_profile=P3)
    path = write_tar("00000.tar", {"0": good_members(0) | {"png": picture}})
    (batch,) = take(data_config(shards=str(path)), 1, batch_size=1, size_px=8)
    pixels = ((batch.image[0] + 1) * 127.5).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels, np.broadcast_to((250, 31, 13), (8, 8, 3)), atol=1.01)


@pytest.mark.parametrize(
    ("format", "shorter_side_px"), [("PNG", 8), ("JPEG", 8), ("TIFF", 8), ("TIFF", None)]
)
def test_what_is_encoded_anew_is_in_srgb_once(format, shorter_side_px):
    """By `data download` and `data pack`: the new file has no profile, and is not moved again when it is read."""
    data = saved(Image.new("RGB", (16, 16), (230, 60, 40)), format, icc_profile=P3)
    made = prepare(data, "k", shorter_side_px)
    assert made.image is not None
    with Image.open(io.BytesIO(made.image)) as image:
        assert "icc_profile" not in image.info
    np.testing.assert_allclose(decode(made.image)[2, 2], (250, 31, 13), atol=5)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_what_pack_makes_of_another_format_has_the_right_colours(extension):
    kind = "WEBP" if extension == "png" else "PNG"
    data = saved(Image.new("RGB", (16, 16), (230, 60, 40)), kind, icc_profile=P3, **LOSSLESS[kind])
    made = prepare(data, "k", extension=extension)
    assert made.image is not None
    with Image.open(io.BytesIO(made.image)) as image:
        assert "icc_profile" not in image.info
        np.testing.assert_allclose(np.asarray(image)[2, 2], (250, 31, 13), atol=5)
