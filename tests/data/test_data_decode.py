import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from data_samples import encode, noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from t2i.data.decode import (
    BadSample,
    covering_size,
    decode_image,
    image_bytes,
    resize,
    resize_and_crop,
)


def decode(data: bytes, **options) -> np.ndarray:
    image, size = decode_image(data, "k", **options)
    assert image.mode == "RGB"
    if "size_px" not in options:
        assert size == (image.height, image.width)
    return np.asarray(image)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_by_hand(pixels: np.ndarray, bits: int = 16, transparent: tuple[int, ...] = ()) -> bytes:
    """(H, W) grey or, in 16 bits, (H, W, 3) RGB; W a multiple of 8 below 8 bits. transparent: the colour that is"""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    values = pixels.astype(">u2").reshape(height, -1, 1).view(np.uint8)  # high and low bytes
    packed = np.packbits(np.unpackbits(values, axis=-1)[..., 16 - bits :].reshape(height, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    colour = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    signature = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return signature + colour + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_rgb_comes_back_as_it_was():
    np.testing.assert_array_equal(decode(encode(noise(0))), noise(0))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    format = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    np.testing.assert_allclose(decode(saved(image, format)), 255, atol=1)


@pytest.mark.parametrize(("cmyk", "rgb"), [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0))])
def test_cmyk_jpeg(cmyk, rgb):
    data = saved(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)
    np.testing.assert_allclose(decode(data), np.broadcast_to(rgb, (16, 16, 3)), atol=4)


def test_16_bit_grey_is_scaled_and_not_clipped():
    grey = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
    wanted = np.rint(grey / 65535 * 255)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(decode(png_by_hand(grey)), wanted)


def test_16_bit_rgb_is_scaled():
    rgb = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    np.testing.assert_allclose(decode(png_by_hand(rgb)), rgb / 65535 * 255, atol=1)


def test_alpha_is_composed_on_white():
    rgba = np.dstack([noise(0), np.random.default_rng(1).integers(0, 256, (12, 16), dtype=np.uint8)])
    alpha = rgba[..., 3:] / 255
    np.testing.assert_allclose(decode(encode(rgba)), rgba[..., :3] * alpha + 255 * (1 - alpha), atol=1)


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    assert (decode(saved(image, "PNG", transparency=1)) == 255).all()
    assert (decode(saved(image, "PNG")) == (200, 0, 0)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_any_bits_is_white(bits):
    grey = np.random.default_rng(0).integers(0, 2**bits, (6, 8), dtype=np.uint16)
    shown = decode(png_by_hand(grey, bits, (int(grey[0, 0]),)))[..., 0]
    opaque = np.rint(grey / (2**bits - 1) * 255)
    np.testing.assert_array_equal(shown, np.where(grey == grey[0, 0], 255, opaque))


def test_a_transparent_colour_of_16_bits_is_white():
    rgb = np.random.default_rng(0).integers(0, 65536, (5, 8, 3), dtype=np.uint16)
    shown = decode(png_by_hand(rgb, 16, tuple(rgb[0, 0].tolist())))
    assert (shown[0, 0] == 255).all()
    np.testing.assert_allclose(shown[1:], rgb[1:] / 257, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size_px", [None, (3, 4)])
def test_exif_orientation(orientation, size_px):
    """By the standard's own words: which corner of the scene row 0 and column 0 of the file show."""
    scene = np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6)[..., None] * 10, np.ones((8, 8, 3), np.uint8))
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: scene.transpose(1, 0, 2)[::-1],
        7: scene.transpose(1, 0, 2)[::-1, ::-1],
        8: scene.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", quality=95, subsampling=0, exif=exif)
    image, size = decode_image(data, "k", size_px)
    assert size == (32, 48)
    assert image.height * 3 == image.width * 2
    assert image.height < 32 if size_px else image.height == 32
    np.testing.assert_allclose(np.asarray(image.resize((48, 32), Image.Resampling.NEAREST)), scene, atol=6)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format, options in [("WEBP", {"lossless": True}), ("GIF", {})]:
        data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (decode(data) == (255, 0, 0)).all()


def test_a_bomb_is_refused_before_its_pixels_are_made():
    bomb = saved(Image.new("1", (30_000, 10_000)), "PNG")  # 300 megapixels in 40 kB
    with pytest.raises(BadSample) as error:
        decode_image(bomb, "k")
    assert error.value.cause == "bomb"
    with pytest.raises(BadSample) as error:
        decode_image(encode(noise(0)), "k", max_pixels=12 * 16 - 1)
    assert error.value.cause == "bomb"
    decode_image(encode(noise(0)), "k", max_pixels=12 * 16)


def test_whatever_is_wrong_with_the_bytes_is_a_bad_image():
    jpeg = encode(noise(0, 64, 64), "JPEG")
    for data in [b"", b"not a picture", jpeg[: len(jpeg) // 2], jpeg[:20], encode(noise(0))[:100]]:
        with pytest.raises(BadSample) as error:
            decode_image(data, "k7")
        assert (error.value.cause, error.value.key) == ("image", "k7")
        assert " at 0x" not in str(error.value)  # the same in every epoch, so that it is logged once
    floating = saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(BadSample, match="floating-point"):
        decode_image(floating, "k")
    with pytest.raises(BadSample, match="no picture"):
        image_bytes({"txt": b"", "json": b""}, "k")


@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]))
def test_changed_bytes_never_raise_anything_else(data, format):
    content = bytearray(encode(noise(3), format))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadSample):
        image, _ = decode_image(bytes(content), "k", (8, 8), max_pixels=10_000)
        assert image.mode == "RGB"


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(4 * x * y)]
    return np.stack([127.5 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def resized(pixels: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    return resize(Image.fromarray(pixels), size_px).permute(1, 2, 0).numpy()


@given(st.tuples(*[st.integers(1, 60)] * 2), st.tuples(*[st.integers(1, 60)] * 2))
def test_resizes_as_pillows_antialiased_bicubic(size, target):
    # No overshoot: it is cut off between rows and columns, in either order.
    pixels = 90 + noise(0, *size) // 4
    reference = Image.fromarray(pixels).resize(target[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_allclose(resized(pixels, target).astype(int), np.asarray(reference).astype(int), atol=2)


def area_average(pixels: np.ndarray, size: int) -> np.ndarray:
    """Exact integrals over each target pixel's area, from the cumulative sum, along both axes."""
    for axis in (0, 1):
        total = np.cumsum(pixels, axis=axis, dtype=np.float64)
        total = np.concatenate([np.zeros_like(total.take([0], axis)), total], axis)
        edges = np.linspace(0, pixels.shape[axis], size + 1)
        low = np.floor(edges).astype(int).clip(max=pixels.shape[axis] - 1)
        part = (edges - low).reshape([-1 if a == axis else 1 for a in range(3)])
        integral = total.take(low, axis) * (1 - part) + total.take(low + 1, axis) * part
        pixels = np.diff(integral, axis=axis) * size / pixels.shape[axis]
    return pixels


@pytest.mark.parametrize("size", [100, 75, 33, 17])
def test_other_ratios_are_close_to_means_over_areas(size):
    pixels = smooth(128, 128)
    np.testing.assert_allclose(resized(pixels, (size, size)), area_average(pixels, size), atol=3)


def test_what_the_target_cannot_show_does_not_alias():
    stripes = np.zeros((96, 96, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resized(stripes, (36, 36))[4:-4, 4:-4].astype(float)
    assert abs(small.mean() - 127.5) < 2
    assert small.std() < 8  # every second pixel taken as it is: 127


@pytest.mark.parametrize("size", [256, 128, 64, 50])
def test_scaled_jpeg_decoding_gives_the_same_picture(size):
    data = saved(Image.fromarray(smooth(256, 384)), "JPEG", quality=95)
    full, original = decode_image(data, "k")
    scaled, also_original = decode_image(data, "k", (size, size))
    assert original == also_original == (256, 384)
    assert scaled.height >= size
    assert scaled.height < 2 * size
    a, crop_a = resize_and_crop(full, original, (size, size))
    b, crop_b = resize_and_crop(scaled, original, (size, size))
    assert crop_a == crop_b
    assert (a.float() - b.float()).abs().max() <= 6


@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)) | st.none(),
)
def test_the_crop_has_the_size_asked_for_and_lies_inside(original, size_px, place):
    covering = covering_size(original, size_px)
    scale = max(size_px[0] / original[0], size_px[1] / original[1])
    assert size_px[0] == covering[0] or size_px[1] == covering[1]
    assert abs(covering[0] - original[0] * scale) < 1
    assert abs(covering[1] - original[1] * scale) < 1
    picture, (top, left) = resize_and_crop(Image.new("RGB", original[::-1]), original, size_px, place)
    assert picture.shape == (3, *size_px)
    assert picture.dtype == torch.uint8
    assert 0 <= top <= covering[0] - size_px[0]
    assert 0 <= left <= covering[1] - size_px[1]
    if place is None:
        assert abs(2 * top - (covering[0] - size_px[0])) <= 1
        assert abs(2 * left - (covering[1] - size_px[1])) <= 1


def test_the_crop_says_what_was_cut():
    pixels = noise(0, 20, 40)
    picture, (top, left) = resize_and_crop(Image.fromarray(pixels), (20, 40), (20, 20), (0.3, 0.7))
    assert (top, left) == (0, 14)
    np.testing.assert_array_equal(picture.permute(1, 2, 0).numpy(), pixels[:, 14:34])
