"""Masks of pictures to start from: what is white, and opaque, is drawn anew."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i.errors import ConfigError, UserError
from t2i.generation.recipes import found_in
from t2i.generation.starting import read_mask, read_start


def painted(kind: str) -> Image.Image:
    """White in the left half, transparent in the right, where the colour below is white too."""
    alpha = np.zeros((8, 8), dtype=np.uint8)
    alpha[:, :4] = 255
    grey, shown = Image.new("L", (8, 8), 255), Image.fromarray(alpha)
    if kind == "RGBA":
        return Image.merge("RGBA", (grey, grey, grey, shown))
    if kind == "LA":
        return Image.merge("LA", (grey, shown))
    palette = Image.fromarray(alpha // 255, "P")
    palette.putpalette([255] * 6)
    palette.info["transparency"] = 0
    return palette


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_what_is_transparent_stays(tmp_path: Path, kind: str) -> None:
    painted(kind).save(tmp_path / "m.png")
    expected = torch.zeros(1, 8, 8)
    expected[..., :4] = 1
    assert torch.equal(read_mask(tmp_path / "m.png", (8, 8)), expected)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    start = read_start(tmp_path / "a.png", None, tmp_path / "m.png")
    assert start.mask is not None
    assert torch.equal(start.mask, expected)


def test_what_is_no_picture_is_said_once(tmp_path: Path) -> None:
    Image.new("RGB", (600, 1)).save(tmp_path / "strip.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, why in {
        "strip.png": "600 x 1 pixels, allowed: a longer side of at most 100 times the shorter one",
        "text.png": "not a picture in a known format",
    }.items():
        with pytest.raises(UserError) as raised:
            read_start(tmp_path / name, (8, 8))
        assert str(raised.value) == f"{tmp_path / name} is not a picture that can be read: {why}."


def test_a_pipe_holds_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert found_in(tmp_path / "a.png") is None


def test_a_mask_that_paints_nothing_white_is_one_sentence(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "m.png")
    with pytest.raises(
        ConfigError, match=r"m\.png is 'white nowhere'; allowed: white \(128 or more of 255\) where"
    ):
        read_start(tmp_path / "a.png", None, tmp_path / "m.png")


def test_a_picture_is_on_white_where_it_is_transparent(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_start(tmp_path / "a.png", None).image == 1).all()


def test_the_page_shows_of_a_mask_what_was_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    from t2i.serving.page import painted_over

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    grey = np.full((8, 8), 100, dtype=np.uint8)
    grey[:, :4] = 200
    for mask in (Image.fromarray(grey), painted("RGBA")):
        mask.save(tmp_path / "m.png")
        (layer,) = painted_over(tmp_path / "a.png", tmp_path / "m.png")["layers"]
        shown = np.asarray(layer.getchannel("A"))
        assert (shown[:, :4] == 255).all()
        assert (shown[:, 4:] == 0).all()
