"""Pictures that are moved before they become codes."""

import dataclasses

import pytest
import torch

from t2i.data_config import DataConfig
from t2i.errors import ConfigError
from t2i.families.tokens import check_shift, moved
from t2i.interfaces import Batch
from t2i.training.randomness import Randomness

SHIFT = 2


@pytest.fixture
def batch() -> Batch:
    image = torch.rand(400, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    size = torch.zeros(400, 2, dtype=torch.int64)
    return Batch(image, [""] * 400, [""] * 400, size, size, [{}] * 400, torch.arange(400))


def at(image: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """Pixel (y, x) is what was at (y + dy, x + dx), or at the nearest one that there was."""
    height, width = image.shape[1:]
    rows = [min(max(y + dy, 0), height - 1) for y in range(height)]
    columns = [min(max(x + dx, 0), width - 1) for x in range(width)]
    return image[:, rows][:, :, columns]


def test_each_picture_is_moved_by_whole_pixels_and_by_all_of_them_alike(batch):
    found = moved(batch, Randomness(0, batch.position, torch.float32), SHIFT).image
    by = [(dy, dx) for dy in range(-SHIFT, SHIFT + 1) for dx in range(-SHIFT, SHIFT + 1)]
    count = dict.fromkeys(by, 0)
    for old, new in zip(batch.image, found, strict=True):
        (where,) = (each for each in by if torch.equal(at(old, *each), new))
        count[where] += 1
    assert all(4 <= times <= 30 for times in count.values())  # 16 each; the standard deviation is 4


def test_none_is_moved_without(batch):
    assert moved(batch, Randomness(0, batch.position, torch.float32), 0) is batch


def test_what_is_refused():
    data = DataConfig(
        source=None, shards="a.tar", caption_keys=["txt"], filter_by_size=False, num_workers=0, cache_mib=0
    )
    check_shift(31, 32, data)
    for value in (-1, 32, 100_000):
        with pytest.raises(
            ConfigError, match=f"shift_px is {value}; allowed: 0 to 31 with resolution.size_px=32"
        ):
            check_shift(value, 32, data)
    ahead = dataclasses.replace(data, encoded="codes")
    check_shift(0, 32, ahead)
    with pytest.raises(ConfigError, match=r"shift_px is 1; allowed: 0 with data\.encoded"):
        check_shift(1, 32, ahead)
