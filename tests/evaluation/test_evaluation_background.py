"""The deviation of white backgrounds, on pictures made for it."""

from __future__ import annotations

import pytest
import torch

from t2i.evaluation.background import white_deviation


def level(value: float) -> float:
    """In [-1, 1]."""
    return value / 127.5 - 1


def pictures() -> torch.Tensor:
    """Two white pictures of 64 px with a dark square of 16 px in the middle."""
    real = torch.ones(2, 3, 64, 64)
    real[:, :, 24:40, 24:40] = -1
    return real


def test_it_is_the_mean_level_that_is_missing():
    real = pictures()
    assert white_deviation(real, real) == 0
    drawn = real.clone()
    drawn[0, 0] = level(252)  # three levels less in one channel of one of two pictures
    assert white_deviation(drawn, real) == pytest.approx(3 / 3 / 2)


def test_only_the_background_counts_and_outlines_may_move_by_two_pixels():
    real = pictures()
    drawn = real.clone()
    drawn[:, :, 22:42, 22:42] = -1
    assert white_deviation(drawn, real) == 0
    drawn[:, :, 21] = -1
    assert white_deviation(drawn, real) > 0


def test_jpeg_white_is_white_and_pictures_without_any_have_no_figure():
    real = pictures()
    real[real == 1] = level(253)
    assert white_deviation(pictures(), real) == 0
    assert white_deviation(pictures(), real - 0.1) is None
