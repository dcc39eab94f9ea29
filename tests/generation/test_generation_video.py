"""Films: frames in and out, what stands between key frames, and how the same noise for each keeps them still."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from t2i.errors import UserError
from t2i.generation.video import flicker, key_frames, read_frames, tweened, write_film
from t2i.training.pictures import save_png, to_pil


def moving(frames: int = 5, side: int = 16) -> Tensor:
    """A square that moves by a pixel a frame, before black."""
    film = -torch.ones(frames, 3, side, side)
    for i in range(frames):
        film[i, :, 4:8, 2 + i : 6 + i] = 1
    return film


@pytest.mark.parametrize("kind", ["folder", "WEBP", "GIF", "PNG"])
def test_frames_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    film = moving()
    path = tmp_path / "film"
    if kind == "folder":
        path.mkdir()
        for i, frame in enumerate(film):
            save_png(frame, path / f"{i:02}.png")
        (path / "notes.txt").write_text("not a frame")
    elif kind == "WEBP":
        write_film([to_pil(frame) for frame in film], path, 40)
    else:
        first, *others = (to_pil(frame) for frame in film)
        first.save(path, format=kind, save_all=True, append_images=others, duration=40)
    found, shown_ms = read_frames(path, (16, 16))
    assert torch.equal(found, film)
    assert shown_ms == (100 if kind == "folder" else 40)


def test_what_is_no_film_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has 0 frames; allowed: 2 to 1,000\."):
        read_frames(tmp_path / "empty", (8, 8))
    save_png(torch.zeros(3, 8, 8), tmp_path / "one.png")
    with pytest.raises(UserError, match=r"one\.png has 1 frames; allowed: 2 to 1,000\."):
        read_frames(tmp_path / "one.png", (8, 8))
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(
        UserError, match=r"film\.mp4 is not a film that can be read.*allowed: a folder of pict"
    ):
        read_frames(tmp_path / "film.mp4", (8, 8))
    with pytest.raises(UserError, match=r"absent\.gif cannot be read"):
        read_frames(tmp_path / "absent.gif", (8, 8))


def test_key_frames_have_both_ends() -> None:
    assert key_frames(10, 4) == [0, 4, 8, 9]
    assert key_frames(3, 1) == [0, 1, 2]


def test_between_key_frames_the_source_moves_and_the_change_goes_over() -> None:
    source = moving() / 2
    drawn = torch.stack([source[0] + 0.2, source[4] - 0.2])
    frames = tweened(source, [0, 4], drawn)
    assert torch.equal(frames[[0, 4]], drawn)
    for i, change in enumerate((0.2, 0.1, 0.0, -0.1, -0.2)):
        torch.testing.assert_close(frames[i], source[i] + change)


def test_flicker_is_what_the_source_does_not_do() -> None:
    source = moving()
    assert flicker(source, source) == 0
    assert flicker(-source, source) == pytest.approx(0, abs=1e-5)
    still = torch.zeros(3, 3, 8, 8)
    blinking = torch.stack([still[0], still[0] + 2 / 255 * 10, still[0]])
    assert flicker(blinking, still) == pytest.approx(10, rel=1e-5)


def test_a_long_picture_in_an_animation_is_cut_to_fit(tmp_path: Path) -> None:
    wide = [Image.fromarray(np.full((8, 32, 3), value, dtype=np.uint8)) for value in (0, 255)]
    wide[0].save(tmp_path / "wide.gif", save_all=True, append_images=wide[1:], duration=40)
    found, _ = read_frames(tmp_path / "wide.gif", (8, 8))
    assert found.shape == (2, 3, 8, 8)
    assert found[1].min() > 0.99
