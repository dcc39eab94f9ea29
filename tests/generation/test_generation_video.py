"""Films: frames in and out, what stands between key frames, and how the same noise for each keeps them still."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from t2i.errors import UserError
from t2i.generation.video import Film, flicker, key_frames, tweened, write_film
from t2i.training.pictures import save_png, to_pil


def read_frames(path: Path, size_px: tuple[int, int]) -> tuple[Tensor, float]:
    film = Film(path, size_px)
    return torch.stack(list(film)), film.shown_ms


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
    with pytest.raises(UserError, match=r"^\S*one\.png has 1 frame; allowed: 2 to 1,000\.$"):
        read_frames(tmp_path / "one.png", (8, 8))
    (tmp_path / "film").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(UserError, match=r"film is not a film that can be read.*allowed: a folder of pict"):
        read_frames(tmp_path / "film", (8, 8))
    with pytest.raises(UserError, match=r"absent\.gif cannot be read"):
        read_frames(tmp_path / "absent.gif", (8, 8))


def movie(path: Path, frames: int = 5, side: int = 64) -> Tensor:
    film = moving(frames, side)
    write_film([to_pil(frame) for frame in film], path, 40)
    return film


def test_an_mp4_is_read_and_written(tmp_path: Path) -> None:
    film = movie(tmp_path / "film.mp4")
    found, shown_ms = read_frames(tmp_path / "film.mp4", (64, 64))
    assert shown_ms == 40
    assert found.shape == film.shape
    # Colour is kept at half the resolution and with loss: on average within a hundredth of the range.
    assert (found - film).abs().mean() < 0.02
    assert (found[0, :, 5:7, 3:5] > 0.8).all()


def test_a_film_is_known_by_its_frames(tmp_path: Path) -> None:
    """Not by its bytes, of which an encoder may make others."""
    pytest.importorskip("av")
    frames = [to_pil(frame) for frame in moving(4, 64)]
    path = write_film(frames, tmp_path / "film.mp4", 40)
    otherwise = path.read_bytes() + b"\0\0\0\x08free"
    path.write_bytes(otherwise)
    assert write_film(frames, path, 40) == path
    assert path.read_bytes() == otherwise
    others = {write_film(frames[::-1], path, 40), write_film(frames, path, 80)}
    assert len(others) == 2
    assert path not in others
    path.write_bytes(b"no film")
    assert write_film(frames, path, 40) not in {path, *others}


def test_a_film_that_was_filmed_upright_is_turned(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    film = moving(3, 64)[:, :, :48]
    path = tmp_path / "turned.mp4"
    write_film([to_pil(frame) for frame in film], path, 40)
    data = bytearray(path.read_bytes())
    # The matrix of the track header (ISO/IEC 14496-12, 8.3.2): as it is, and by a quarter of a turn.
    unity = b"".join(value.to_bytes(4, "big") for value in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    quarter = b"".join(
        (value % 2**32).to_bytes(4, "big") for value in (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    )
    track = data.index(b"tkhd")
    place = data.index(unity, track)
    data[place : place + len(unity)] = quarter
    path.write_bytes(data)
    with av.open(path) as container:
        assert next(container.decode(video=0)).rotation in (90, -90, 270)
    found, _ = read_frames(path, (64, 48))
    upright = torch.rot90(film, -1, (2, 3))  # clockwise, as players show it
    assert (found - upright).abs().mean() < 0.02


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "MOV"])
def test_what_is_no_movie_is_one_sentence(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"film.{ending}"
    path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/film.ts\n")  # a list of addresses
    with pytest.raises(UserError, match=rf"film\.{ending} is not a film that can be read: .*allowed: \.mp4"):
        read_frames(path, (8, 8))


def test_a_cut_movie_is_one_sentence(tmp_path: Path) -> None:
    movie(tmp_path / "film.mp4")
    whole = (tmp_path / "film.mp4").read_bytes()
    (tmp_path / "film.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"film\.mp4 has no pictures, or its index is missing"):
        read_frames(tmp_path / "film.mp4", (8, 8))


@pytest.mark.parametrize(
    ("ending", "codec", "share"), [("mkv", "libx264", 0.6), ("webm", "libvpx", 0.6), ("avi", "mpeg4", 0.9)]
)
def test_a_movie_that_ends_early_is_one_sentence(
    tmp_path: Path, ending: str, codec: str, share: float
) -> None:
    """The library gives the frames that are left of such a file without an error."""
    av = pytest.importorskip("av")
    path = tmp_path / f"film.{ending}"
    for _ in range(2):  # the library says the same thing once
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in moving(20, 64):
                container.mux(stream.encode(av.VideoFrame.from_image(to_pil(frame))))
            container.mux(stream.encode())
        assert len(Film(path, (8, 8))) == 20
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(
            UserError, match=rf"film\.{ending} ends within the film, so that frames are missing"
        ):
            Film(path, (8, 8))


def test_a_movie_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"film\.mp4 needs the package av; `pip install 't2i\[video\]'` brings it"
    ):
        read_frames(tmp_path / "film.mp4", (8, 8))


def test_key_frames_have_both_ends() -> None:
    assert key_frames(10, 4) == [0, 4, 8, 9]
    assert key_frames(3, 1) == [0, 1, 2]


def test_between_key_frames_the_source_moves_and_the_change_goes_over() -> None:
    source = moving() / 2
    drawn = torch.stack([source[0] + 0.2, source[4] - 0.2])
    frames = torch.stack(list(tweened(source, [0, 4], {0: drawn[0], 4: drawn[1]}.__getitem__)))
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


class Counted:
    """Frames that are made when they are asked for; how many of them there are at once at most."""

    def __init__(self, frames: int) -> None:
        self.frames, self.alive, self.most = frames, 0, 0

    def __iter__(self) -> Iterator[Tensor]:
        return (self.made(i / self.frames) for i in range(self.frames))

    def made(self, value: float) -> Tensor:
        frame = torch.full((3, 4, 4), value)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(frame, self.gone)
        return frame

    def gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("every", [1, 7, 99])
def test_as_many_frames_are_in_memory_of_a_long_film_as_of_a_short_one(every: int) -> None:
    most = []
    for count in (10, 200):
        source = Counted(count)
        keys = key_frames(count, min(every, count - 1))
        frames = tweened(source, keys, lambda i, source=source: source.made(0.5))
        flicker(frames, source)
        most.append(source.most)
    assert most[0] == most[1] < 10


@pytest.mark.parametrize("kind", ["folder", "in.webp", "in.mp4"])
def test_a_frame_is_read_without_those_after_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
        for i, each in enumerate(moving(6, 64)):
            save_png(each, path / f"{i}.png")
    else:
        write_film([to_pil(each) for each in moving(6, 64)], path, 40)
    film = Film(path, (64, 64))
    assert len(film) == 6
    expected = list(film)
    read = []
    one_by_one = Film._read

    def told(self: Film) -> Iterator[tuple[Tensor, float]]:
        for frame in one_by_one(self):
            read.append(len(read))
            yield frame

    monkeypatch.setattr(Film, "_read", told)
    for place, so_far in ((1, 2), (2, 3), (4, 5), (0, 6)):  # the last one from the beginning
        assert torch.equal(film.frame(place), expected[place])
        assert len(read) == so_far
