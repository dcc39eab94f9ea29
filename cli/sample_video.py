"""`t2i sample --video`: the frames of a film, each drawn from the same noise."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.config import check
from t2i.errors import UserError
from t2i.generation.prompts import Line

if TYPE_CHECKING:
    from torch import Tensor

    from t2i.generation.text_to_image import Drawing, Report
    from t2i.interfaces import Generator

WITHOUT = (
    "image",
    "mask",
    "extend",
    "invert",
    "variations",
    "interpolate",
    "prompts_file",
    "recipe",
    "layout",
)


def add_flags(made: argparse.ArgumentParser) -> None:
    """Adds them to the parser of `t2i sample`."""
    made.add_argument(
        "--video",
        metavar="FILE|DIR",
        help="draw each frame of an MP4, WebM, animated GIF, WebP or PNG or a folder of pictures, from the same noise",
    )
    made.add_argument(
        "--key-every",
        type=int,
        metavar="K",
        help="draw every K-th frame of --video; those between go from one's change to the next one's, "
        "which leaves outlines of what moves far; default: 1",
    )


def check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError that names the first of them that is not to be had."""
    every = options.key_every
    check(every is None or options.video is not None, "--key-every", every, "only with --video")
    if options.video is None:
        return
    ok = Path(options.video).is_file() or (options.video != "" and Path(options.video).is_dir())
    check(ok, "--video", options.video, "a film or a folder of frames that exists")
    ok = os.path.realpath(options.out) != os.path.realpath(options.video)
    check(ok, "--out", options.out, "another folder than --video")
    for name in WITHOUT:
        value = getattr(options, name)
        check(value is None, "--" + name.replace("_", "-"), value, "without --video")
    check(len(options.prompt or ()) == 1, "--prompt", options.prompt, "one, with --video")
    check(options.num_images in (None, 1), "--num-images", options.num_images, "1 with --video")
    check(every is None or every >= 1, "--key-every", every, "1 or more")


def check_out(line: Line, options: argparse.Namespace, strength: float) -> None:
    """Raises UserError where the frames of another film, or drawn otherwise, lie in --out: before the model is
    loaded."""
    from t2i.generation.names import check_free
    from t2i.generation.recipes import of_files

    known = {"prompt": line.prompt, "seed": line.seed or 0, "strength": strength}
    known |= {"negative_prompt": line.negative_prompt or "", "frame": 0}
    first = Path(options.out) / frame_name(0)
    if os.path.lexists(first):  # a film is long to read
        known["video_sha256"] = of_files(video=options.video)["video_sha256"]
        check_free(first, known)
    every = options.key_every or 1
    check_free(Path(options.out) / frame_name(1), {"key_every": every if every > 1 else None})


def frame_name(frame: int) -> str:
    return f"frame_{frame:05}.png"


class Film:
    """What is drawn of a film.

    source: its frames; keys: those that are drawn
    """

    def __init__(self, line: Line, options: argparse.Namespace, generator: Generator) -> None:
        from t2i.generation.video import Film as Source
        from t2i.generation.video import check_every, key_frames

        side = generator.default_size_px
        self.size = line.height or side, line.width or side
        self.source = Source(Path(options.video), self.size)
        self.every = options.key_every or 1
        check_every(self.every, len(self.source))
        self.keys = key_frames(len(self.source), self.every)
        self.recipe: dict[str, Any] = {}  # of the frames between
        self.path, self.folder = options.video, Path(options.out)

    def drawings(self, line: Line, strength: float, sampling: Any, recipe: dict[str, Any]) -> list[Drawing]:
        """One for each key frame."""
        from functools import partial

        import torch

        from t2i.generation.recipes import of_files
        from t2i.generation.text_to_image import Drawing
        from t2i.interfaces import SampleRequest

        found, film = [], of_files(video=self.path)
        read_later = torch.zeros(()).expand(1, 3, *self.size)  # a thousand frames are more than memory has
        for key in self.keys:
            request = SampleRequest(
                [line.prompt],
                [line.seed or 0],
                *self.size,
                line.negative_prompt or "",
                read_later,
                strength,
            )
            of_frame = {**recipe, **film, "frame": key}
            found.append(
                Drawing(
                    request,
                    sampling,
                    of_frame,
                    [frame_name(key)],
                    is_fixed=True,
                    start=partial(self._frame, key),
                )
            )
        self.recipe = {**found[0].recipe_of(0), "key_every": self.every}
        return found

    def finish(self, report: Report) -> str | None:
        """Writes the frames between and video.webp, or video.mp4 of an MP4 or the like (under another name where
        something else has it), where all key frames are there, and says how they flicker."""
        from t2i.generation.movie import is_movie
        from t2i.generation.text_to_image import read_image
        from t2i.generation.video import Frames, flicker, tweened, write_film

        if not report.whole or any("error" in each for each in report.lines.values()):
            return None
        frames = tweened(self.source, self.keys, lambda i: read_image(self.folder / frame_name(i), self.size))
        more = flicker(self._written(frames), self.source)
        name = "video.mp4" if is_movie(Path(self.path)) else "video.webp"
        pictures = Frames([self.folder / frame_name(i) for i in range(len(self.source))])
        path = write_film([pictures], self.folder / name, self.source.shown_ms)
        return (
            f"{path}: {len(self.source)} frames, {len(self.keys)} of them drawn; neighbours differ by "
            f"{abs(more):.2f} of 255 {'more' if more > 0 else 'less'} than those of {self.path}."
        )

    def _frame(self, place: int) -> Tensor:
        return self.source.frame(place)[None]

    def _written(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """The frames; those that lie between are written as they pass."""
        from t2i.generation.names import save_new
        from t2i.training.pictures import to_pil

        drawn = set(self.keys)
        for i, frame in enumerate(frames):
            if i not in drawn:
                recipe = {**self.recipe, "frame": i}
                save_new(to_pil(frame), self.folder / frame_name(i), recipe, is_fixed=True)
            yield frame


def check_recipe(recipe: dict[str, Any], path: Path) -> None:
    """Raises UserError for a frame of a film, which only --video makes again."""
    if "video" in recipe:
        raise UserError(f"{path} is a frame of a film, which --video {recipe['video']!r} makes again.")
