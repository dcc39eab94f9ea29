"""Tensors to pixels, and grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.training.pictures import grid, save_png, to_pil, to_uint8


def test_every_byte_comes_back():
    """x / 127.5 - 1 is how the read path makes floats."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_to_the_nearest_and_clamped(dtype):
    step = 2 / 255
    for byte in (0, 1, 100, 254, 255):
        for offset in (-0.4, 0.4):
            value = torch.tensor([(byte + offset) * step - 1], dtype=torch.float64)
            assert to_uint8(value).item() == byte
    extremes = torch.tensor([-7.0, -1.0, 1.0, 7.0, float("inf"), -float("inf")], dtype=dtype)
    assert to_uint8(extremes).tolist() == [0, 0, 255, 255, 255, 0]


def test_uint8_keeps_shape_and_leaves_its_input_alone():
    image = torch.full((2, 3, 4, 5), 0.5, requires_grad=True)
    result = to_uint8(image)
    assert (result.shape, result.dtype, result.requires_grad) == (image.shape, torch.uint8, False)
    assert torch.equal(image.detach(), torch.full((2, 3, 4, 5), 0.5))


def test_to_pil_puts_channels_and_axes_where_they_belong():
    image = -torch.ones(3, 2, 4)
    image[0, 0, 3] = 1  # red, first row, last column
    image[2, 1, 0] = 1  # blue, second row, first column
    picture = to_pil(image)
    assert (picture.size, picture.mode) == ((4, 2), "RGB")
    assert picture.getpixel((3, 0)) == (255, 0, 0)
    assert picture.getpixel((0, 1)) == (0, 0, 255)


def test_grid_by_hand():
    """Three pictures of 1 x 2 px in two columns with gaps of 1 px; what is empty is white."""
    images = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]).reshape(3, 1, 1, 2).repeat(1, 3, 1, 1)
    expected = torch.tensor(
        [
            [0.1, 0.2, 1.0, 0.3, 0.4],
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [0.5, 0.6, 1.0, 1.0, 1.0],
        ]
    )
    assert torch.equal(grid(images, columns=2, gap_px=1), expected.repeat(3, 1, 1))


@pytest.mark.parametrize(
    ("count", "columns", "gap_px"), [(1, 1, 2), (1, 8, 2), (8, 8, 2), (9, 8, 0), (5, 2, 3)]
)
def test_grid_size_and_places(count, columns, gap_px):
    images = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    sheet = grid(images, columns, gap_px)
    rows = (count + columns - 1) // columns
    assert sheet.shape == (3, rows * 5 + (rows - 1) * gap_px, columns * 7 + (columns - 1) * gap_px)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        y, x = row * (5 + gap_px), column * (7 + gap_px)
        assert torch.equal(sheet[:, y : y + 5, x : x + 7], image)
    assert (sheet == 1).sum() == sheet.numel() - images.numel()


def test_save_png_makes_its_folder_and_loses_nothing(tmp_path):
    pixels = torch.randint(0, 256, (3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = tmp_path / "samples" / "step.png"
    save_png(pixels.float() / 127.5 - 1, path, note="größer — 大")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.text == {"note": "größer — 大"}
        assert np.array_equal(np.asarray(picture), pixels.permute(1, 2, 0).numpy())
