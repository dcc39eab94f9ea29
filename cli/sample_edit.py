"""What `t2i sample` takes to start from a picture, to keep a part of one, and to go from one to another."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.config import check
from t2i.generation.extension import SIDES, STRENGTH, usual_strength, within
from t2i.generation.prompts import MAX_PX, MAX_SEED, Line
from t2i.schema import check_number, is_unicode

if TYPE_CHECKING:
    from torch import Tensor

    from t2i.generation.starting import Start
    from t2i.interfaces import Generator

VARIATION = 0.2
MOST_BETWEEN = 1_000
TILES = ("x", "y", "xy")
# What a picture's recipe says of these flags, by the names of the options.
RECIPE: dict[str, type] = {
    "image": str,
    "strength": float,
    "mask": str,
    "extend": str,
    "invert": str,
    "tile": str,
}


def add_flags(made: argparse.ArgumentParser) -> None:
    """Adds them to the parser of `t2i sample`."""
    made.add_argument(
        "--image",
        metavar="FILE",
        help="start from this picture, resized and cut to fit, on white where transparent",
    )
    made.add_argument(
        "--strength",
        type=float,
        help=f"how far from --image, above 0 to 1; default: {STRENGTH}, or 1 with --mask or --extend",
    )
    made.add_argument(
        "--mask",
        metavar="FILE",
        help="of the size of --image: white where it is drawn anew; the rest, black or transparent, stays",
    )
    made.add_argument(
        "--extend",
        metavar="SIDE=PX,...",
        help="draw around --image, as left=128,top=64; it keeps its size, or "
        "is cut so that --height and --width are those of the whole",
    )
    made.add_argument(
        "--invert",
        metavar="PROMPT",
        help="start from the noise that ddim draws --image from for this prompt",
    )
    made.add_argument(
        "--tile", choices=TILES, help="pictures whose copies join without a seam along x, y or both"
    )
    made.add_argument("--variations", type=int, metavar="N", help="draw N pictures near that of each seed")
    made.add_argument(
        "--variation-strength",
        type=float,
        help=f"how far --variations go towards other noise, above 0 to 1; default: {VARIATION}",
    )
    made.add_argument(
        "--interpolate",
        type=int,
        metavar="N",
        help="N steps from each picture to the next, over prompts and seeds; with strip.png and strip.webp",
    )


def check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError that names the first of them that is not to be had."""
    for name in ("image", "mask"):
        path = getattr(options, name)
        check(path is None or Path(path).is_file(), f"--{name}", path, "a picture file that exists")
    value = options.strength
    ok = value is None or options.image is not None or options.video is not None
    check(ok, "--strength", value, "only with --image or --video")
    for name in ("mask", "extend", "invert"):
        value = getattr(options, name)
        check(value is None or options.image is not None, f"--{name}", value, "only with --image")
    for name in ("strength", "variation_strength"):
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        check(value is None or 0 < value <= 1, flag, value, "above 0, at most 1")
    if options.extend is not None:
        parse_extension(options.extend)
    if options.invert is not None:
        for name in ("strength", "mask", "extend"):
            value = getattr(options, name)
            check(value is None, f"--{name}", value, "without --invert")
    check(options.tile in (None, *TILES), "--tile", options.tile, ", ".join(TILES))
    for name in ("variations", "interpolate"):
        value = getattr(options, name)
        check_number(f"--{name}", value, MOST_BETWEEN)
        ok = value is None or (options.prompts_file is None and options.recipe is None)
        check(ok, f"--{name}", value, "without --prompts-file and --recipe")
    for name in ("interpolate", "invert"):
        value = getattr(options, name)
        ok = value is None or options.variations is None
        check(ok, "--variations", options.variations, f"without --{name}")
    ok = options.interpolate is None or options.invert is None
    check(ok, "--interpolate", options.interpolate, "without --invert")
    value = options.variation_strength
    check(
        value is None or options.variations is not None,
        "--variation-strength",
        value,
        "only with --variations",
    )


def parse_extension(text: str) -> dict[str, int]:
    """ "left=128,top=64" -> pixels by side. Raises ConfigError."""
    found: dict[str, int] = {}
    allowed = f"sides among {', '.join(SIDES)}, each once with 1 to {MAX_PX:,} pixels, as left=128,top=64"
    for part in text.split(","):
        side, _, number = part.strip().partition("=")
        ok = side in SIDES and side not in found and number.isascii() and number.isdigit()
        check(ok and 1 <= int(number[:9]) <= MAX_PX, "--extend", text, allowed)
        found[side] = int(number)
    return found


def between(lines: Sequence[Line], options: argparse.Namespace) -> list[Line]:
    """The lines, or those of the pictures near theirs or on the way from one to the next."""
    if options.variations is not None:
        share = VARIATION if options.variation_strength is None else options.variation_strength
        for line in lines:
            last = MAX_SEED - options.variations - (line.num_images or 1) + 1
            allowed = f"0 to {last} with --variations {options.variations}"
            check((line.seed or 0) <= last, "--seed", line.seed, allowed)
        return [
            dataclasses.replace(end, num_images=1, between={"seed": other, "share": share})
            for end in _ends(lines)
            for other in range((end.seed or 0) + 1, (end.seed or 0) + 1 + options.variations)
        ]
    if options.interpolate is None:
        return list(lines)
    ends = _ends(lines)
    allowed = "two pictures or more: several --prompt, or --num-images"
    check(len(ends) > 1, "--interpolate", "of one picture", allowed)
    found = []
    for first, second in pairwise(ends):
        other = {"prompt": second.prompt} | ({"seed": second.seed} if second.seed != first.seed else {})
        shares = [i / options.interpolate for i in range(options.interpolate)]
        found += [dataclasses.replace(first, between={**other, "share": share}) for share in shares]
    return [*found, ends[-1]]


def _ends(lines: Sequence[Line]) -> list[Line]:
    """A line for each picture."""
    seeds = [(line, (line.seed or 0) + i) for line in lines for i in range(line.num_images or 1)]
    return [dataclasses.replace(line, seed=seed, num_images=1) for line, seed in seeds]


def check_between(value: dict[str, Any] | None, path: Path) -> dict[str, Any]:
    """What a recipe says of the other end. Raises ConfigError."""
    if not value:
        return {}
    seed, share, prompt = (value.get(name) for name in ("seed", "share", "prompt"))
    ok = (
        set(value) <= {"seed", "share", "prompt"}
        and ("seed" not in value or (type(seed) is int and 0 <= seed <= MAX_SEED))
        and (isinstance(share, float | int) and 0 <= share <= 1)
        and isinstance(prompt, str | None)
        and is_unicode(prompt or "")
    )
    check(ok, f"between in {path}", value, "a share from 0 to 1, and a seed or a prompt")
    return value


def start_of(line: Line, options: argparse.Namespace, size_px: int) -> Start | None:
    """What the pictures of this line start from. With --extend the size is that of the whole, and where none is given
    the picture keeps its own."""
    from t2i.generation.starting import read_start

    if options.image is None:
        return None
    extend = None if options.extend is None else parse_extension(options.extend)
    whole = line.height or size_px, line.width or size_px
    size: tuple[int, int] | None = whole
    if extend is not None and line.height is None and line.width is None:
        size = None
    elif extend is not None:
        size = within(whole, extend, "--extend", options.extend)
    return read_start(Path(options.image), size, None if options.mask is None else Path(options.mask), extend)


def strength_of(options: argparse.Namespace) -> float:
    """All of the way where a part of the picture stays."""
    if options.strength is not None:
        return float(options.strength)
    return usual_strength(options.mask is not None or options.extend is not None)


def inverted(generator: Generator, sampling: Any, start: Start, prompt: str, negative_prompt: str) -> Tensor:
    """(1, ...) noise of the picture for the prompt. Raises ConfigError where the sampler is another than ddim."""
    from t2i.interfaces import SampleRequest

    sampler = getattr(sampling, "sampler", "ddim")
    check(sampler == "ddim", "--invert with sampling.sampler", sampler, "ddim: name it by --sampler ddim")
    generator.sampling = sampling
    return generator.invert(SampleRequest([prompt], [0], *start.size_px, negative_prompt, start.image[None]))
