"""Captioned scenes of one to three coloured shapes, drawn without any download.

Some combinations of shape, colour, background and position are held out of training, in all kinds of scenes;
`t2i.evaluation.shapes.check` reads from the pixels which attributes of a caption a picture has.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from PIL import Image

from t2i.errors import DataError
from t2i.evaluation.shapes import (
    BACKGROUNDS,
    COLOURS,
    POSITION_CENTRES,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SUPERSAMPLING,
    Scene,
    SceneObject,
    draw_shape,
    outline,
)

from ..shard_writer import Sample, complete_directory, png_sample, write_shards

MIN_SIZE_PX = 32
JITTER = 0.03  # of each centre, along x and y
RELATION_OFFSET = (
    0.255  # of two centres from the middle: two large stars leave 0.05 between and fit the picture
)
GAP = 0.07  # between the circles around two shapes: at 32 px, two pixels
NUMBER = {2: "two", 3: "three"}
PLACE = {
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "on the left",
    "right": "on the right",
    "center": "in the center",
    "top left": "in the top left",
    "top right": "in the top right",
    "bottom left": "in the bottom left",
    "bottom right": "in the bottom right",
}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

Centres = list[tuple[float, float]]


def build(
    directory: Path,
    num_train: int = 6000,
    num_heldout_one: int = 256,
    num_heldout_two: int = 128,
    size_px: int = 64,
    seed: int = 0,
) -> None:
    """Writes `directory`/train: scenes of one object (half), two (3/8), two or three alike (1/8); and
    `directory`/heldout: scenes of one object and of two, each object an unseen combination.

    The same arguments give the same bytes. Raises DataError where `size_px` is too small or `directory` is
    not empty.
    """
    if size_px < MIN_SIZE_PX:
        raise DataError(f"size_px is {size_px}; allowed: {MIN_SIZE_PX} or more.")
    kinds = (random_one, random_two, random_one, random_two, random_one, random_two, random_one, random_alike)
    train = itertools.islice(itertools.cycle(kinds), num_train)
    heldout = [random_one] * num_heldout_one + [random_two] * num_heldout_two
    with complete_directory(directory) as unfinished:
        rng = random.Random(f"{seed} train")
        write_shards((_sample(kind, False, size_px, rng) for kind in train), unfinished / "train")
        rng = random.Random(f"{seed} heldout")
        write_shards((_sample(kind, True, size_px, rng) for kind in heldout), unfinished / "heldout")


def is_heldout(item: SceneObject, background: str) -> bool:
    """Whether the combination is never trained on. Of each shape and colour, one background of the four and
    one position of the nine are held out; every pair of attributes is still seen."""
    shape, colour = SHAPES.index(item.shape), list(COLOURS).index(item.colour)
    if list(BACKGROUNDS).index(background) == (shape + colour) % len(BACKGROUNDS):
        return True
    return item.position is not None and POSITIONS.index(item.position) == (shape + 2 * colour) % len(
        POSITIONS
    )


def random_one(rng: random.Random) -> Scene:
    """One object with a position."""
    item = _random_object(rng)
    return Scene(_choice(rng, BACKGROUNDS), (replace(item, position=_choice(rng, POSITIONS)),))


def random_two(rng: random.Random) -> Scene:
    """Two objects that differ in shape or colour, and where the first is, seen from the second."""
    first, second = _random_object(rng), _random_object(rng)
    while (first.shape, first.colour) == (second.shape, second.colour):
        second = _random_object(rng)
    return Scene(_choice(rng, BACKGROUNDS), (first, second), _choice(rng, RELATIONS))


def random_alike(rng: random.Random) -> Scene:
    """Two or three objects with the same words."""
    return Scene(_choice(rng, BACKGROUNDS), (_random_object(rng),) * rng.choice((2, 3)))


def place(scene: Scene, rng: random.Random) -> Centres:
    """Centres that make the scene true and keep its shapes apart and inside the picture."""
    if scene.relation is not None:
        dx, dy = (RELATION_OFFSET * direction for direction in RELATIONS[scene.relation])
        return [_jitter(0.5 + dx, 0.5 + dy, rng), _jitter(0.5 - dx, 0.5 - dy, rng)]
    position = scene.objects[0].position
    if position is not None:
        row, column = divmod(POSITIONS.index(position), 3)
        return [_jitter(POSITION_CENTRES[column], POSITION_CENTRES[row], rng)]
    # Objects alike stand anywhere: draw until the circles around them neither touch nor leave the picture.
    corners = outline(scene.objects[0].shape, SIZES[scene.objects[0].size], 0, 0)
    radius = max(math.hypot(*corner) for corner in corners)
    while True:
        centres = [(rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)) for _ in scene.objects]
        if all(math.dist(a, b) > 2 * radius + GAP for a, b in itertools.combinations(centres, 2)):
            return centres


def render(scene: Scene, centres: Centres, size_px: int) -> Image.Image:
    """The scene with object i at centres[i], antialiased."""
    canvas = Image.new("RGB", (size_px * SUPERSAMPLING,) * 2, BACKGROUNDS[scene.background])
    for item, (x, y) in zip(scene.objects, centres, strict=True):
        draw_shape(canvas, outline(item.shape, SIZES[item.size], x, y), COLOURS[item.colour])
    return canvas.reduce(SUPERSAMPLING)


def caption(scene: Scene, rng: random.Random) -> str:
    """One of several ways to say the scene."""
    words = [f"{item.size} {item.colour} {item.shape}" for item in scene.objects]
    position = scene.objects[0].position
    if scene.relation is not None:
        content = f"a {words[0]} {rng.choice(RELATION_PHRASES[scene.relation])} a {words[1]}"
    elif position is not None:
        content = f"a {words[0]} {PLACE[position]}"
    else:
        content = f"{NUMBER[len(words)]} {words[0]}s"
    ways = (
        f"{content} on a {scene.background} background",
        f"{content}, {scene.background} background",
        f"on a {scene.background} background, {content}",
    )
    return rng.choice(ways)


def attributes(scene: Scene) -> dict[str, str]:
    """The scene's words, flat; those of several objects are joined in their order."""
    words = {
        "count": str(len(scene.objects)),
        "background": scene.background,
        "shape": ", ".join(item.shape for item in scene.objects),
        "colour": ", ".join(item.colour for item in scene.objects),
        "size": ", ".join(item.size for item in scene.objects),
    }
    if scene.objects[0].position is not None:
        words["position"] = scene.objects[0].position
    if scene.relation is not None:
        words["relation"] = scene.relation
    return words


def _sample(kind: Callable[[random.Random], Scene], unseen: bool, size_px: int, rng: random.Random) -> Sample:
    scene = _drawn(kind, unseen, rng)
    picture = render(scene, place(scene, rng), size_px)
    columns = {"attributes": attributes(scene), "scene": scene.to_json(), "unseen": unseen}
    return png_sample(picture, caption(scene, rng), columns)


def _drawn(kind: Callable[[random.Random], Scene], unseen: bool, rng: random.Random) -> Scene:
    """A scene whose objects are all held out (unseen), or none of them."""
    scene = kind(rng)
    while any(is_heldout(item, scene.background) != unseen for item in scene.objects):
        scene = kind(rng)
    return scene


def _random_object(rng: random.Random) -> SceneObject:
    return SceneObject(_choice(rng, SHAPES), _choice(rng, COLOURS), _choice(rng, SIZES))


def _choice(rng: random.Random, words: Iterable[str]) -> str:
    return rng.choice(list(words))


def _jitter(x: float, y: float, rng: random.Random) -> tuple[float, float]:
    return x + rng.uniform(-JITTER, JITTER), y + rng.uniform(-JITTER, JITTER)


def composition(per_category: int) -> list[tuple[str, str, Scene]]:
    """Prompts of combinations that are never trained on, so many of each of `t2i.evaluation.suites.CATEGORIES`: the
    category, the caption and the scene. Always the same ones."""
    kinds: dict[str, Callable[[random.Random], Scene]] = {
        "counts": random_alike,
        "colours": random_one,
        "positions": random_one,
        "relations": random_two,
        "sizes": random_one,
        "binding": _random_unlike,
    }
    made = []
    for category, kind in kinds.items():
        rng = random.Random(f"0 {category}")
        for _ in range(per_category):
            scene = _drawn(kind, True, rng)
            made.append((category, caption(scene, rng), scene))
    return made


def _random_unlike(rng: random.Random) -> Scene:
    """Two objects that differ in shape and in colour, so that each has to have its own."""
    while True:
        scene = random_two(rng)
        first, second = scene.objects
        if first.shape != second.shape and first.colour != second.colour:
            return scene
