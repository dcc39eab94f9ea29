"""Scenes of coloured shapes: their vocabulary, their geometry, and an exact checker that reads pixels only.

A scene says all that its caption says. `check` finds the shapes in a picture and answers, for each attribute,
whether the picture has it: the accuracy of a text-to-image model without any learned judge (after CLEVR,
Johnson et al. 2017, and GenEval, Ghosh et al. 2023, which judge composition by attribute).

Lengths are fractions of the picture's side, areas of its area; x runs right, y down.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

Pixels = NDArray[np.floating[Any]]

SHAPES = ("circle", "square", "triangle", "star")
# Far apart from one another and from the backgrounds: at least 0.38 in RGB from 0 to 1.
COLOURS = {
    "red": (220, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 230, 40),
    "green": (30, 160, 60),
    "cyan": (40, 210, 230),
    "blue": (40, 70, 220),
    "purple": (150, 30, 200),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "pink": (250, 170, 190)}
# All shapes of a size have the same area, so that size can be told whatever the shape. A small square is 6
# pixels wide at 32 px: below that, a circle is hardly told from a square. Two large stars just fit side by side.
SIZES = {"small": 0.033, "large": 0.055}
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
POSITION_CENTRES = (0.25, 0.5, 0.75)  # of the three columns, and of the three rows
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

SUPERSAMPLING = 4
MAX_BLOBS = 4  # more are counted but not measured
MIN_BLOB_AREA = SIZES["small"] / 4
MIN_RELATION_DISTANCE = 0.1
PATCH = 12  # samples along a side of the window in which blobs and templates are compared
TEMPLATE_BLURS_PX = (0.0, 0.6, 1.1)  # generated edges are softer than drawn ones


@dataclass(frozen=True)
class SceneObject:
    """One shape. position is None where the caption does not say it."""

    shape: str
    colour: str
    size: str
    position: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption says. relation: where the first object is, seen from the second; None if not said."""

    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Scene:
        objects = tuple(SceneObject(**item) for item in values["objects"])
        return cls(values["background"], objects, values["relation"])


@dataclass(frozen=True)
class Blob:
    """A shape found in a picture: its centre of mass (x, y), its area, and the nearest words."""

    x: float
    y: float
    area: float
    shape: str
    colour: str

    @property
    def size(self) -> str:
        return "small" if self.area < math.sqrt(SIZES["small"] * SIZES["large"]) else "large"

    @property
    def position(self) -> str:
        column, row = (min(range(3), key=lambda i: abs(POSITION_CENTRES[i] - v)) for v in (self.x, self.y))
        return POSITIONS[3 * row + column]


def outline(shape: str, area: float, x: float, y: float) -> list[tuple[float, float]]:
    """The corners of an upright shape whose centre of mass is (x, y); a circle has 64 of them."""
    corners = {"circle": 64, "square": 4, "triangle": 3, "star": 10}[shape]
    inner = 0.42 if shape == "star" else 1.0  # radius of every second corner
    step = 2 * math.pi / corners
    # Between two corners lies a triangle from the centre, of area r_i r_(i+1) sin(step) / 2.
    scale = math.sqrt(2 * area / (corners * inner * math.sin(step)))
    points = []
    for i in range(corners):
        radius = scale if i % 2 == 0 else scale * inner
        angle = (i + 0.5 if shape == "square" else i) * step
        points.append((x + radius * math.sin(angle), y - radius * math.cos(angle)))
    return points


def check(image: Tensor, scene: Scene) -> dict[str, bool]:
    """Which attributes of `scene` a picture has: (3, H, W) float in [-1, 1], 32 px or more along each side.

    Keys: count, background, shape, colour, size; position and relation where the scene says them. With
    several objects an attribute holds if it holds for each of them, under the assignment of the shapes found
    to the objects described that makes most attributes right. An object left without a shape fails in all.
    """
    background, blobs, count = find_blobs(image)
    candidates = [*blobs, *[None] * (len(scene.objects) - len(blobs))]
    assignments = itertools.permutations(candidates, len(scene.objects))
    right = (_compare(scene, chosen) for chosen in assignments)
    best = max(right, key=lambda answers: sum(map(sum, answers.values())))
    whole = {"count": count == len(scene.objects), "background": background == scene.background}
    return whole | {name: all(answers) for name, answers in best.items()}


def find_blobs(image: Tensor) -> tuple[str, list[Blob], int]:
    """(3, H, W) in [-1, 1] -> the background's name, the MAX_BLOBS largest shapes, the number of all."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) / 2).contiguous().numpy()
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]], axis=1)
    background = np.median(border, axis=1)
    # |p - c|^2 without |p|^2, which is the same for each colour c
    colours = np.vstack([background, _palette(*COLOURS)])
    distance = (colours**2).sum(1)[:, None] - 2 * colours @ pixels.reshape(3, -1)
    shapes = (distance[1:].min(0) < distance[0]).reshape(pixels.shape[1:])
    labels, areas = _components(shapes)
    kept = [label for label in np.argsort(-areas) if areas[label] >= MIN_BLOB_AREA * labels.size]
    blobs = [_measure(pixels, labels, label, background) for label in kept[:MAX_BLOBS]]
    return _nearest_name(background), blobs, len(kept)


def coverage(shape: str, area: float, x: float, y: float, size_px: int, blur_px: float = 0.0) -> Pixels:
    """(size_px, size_px) in [0, 1]: the share of each pixel that the shape covers."""
    canvas = Image.new("L", (size_px * SUPERSAMPLING,) * 2)
    draw_shape(canvas, outline(shape, area, x, y), 255)
    if blur_px > 0:
        canvas = canvas.filter(ImageFilter.GaussianBlur(blur_px * SUPERSAMPLING))
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def draw_shape(
    canvas: Image.Image, points: list[tuple[float, float]], fill: int | tuple[int, int, int]
) -> None:
    """Fills an outline on a canvas SUPERSAMPLING times as large as the picture."""
    side = canvas.width
    # PIL's coordinates are those of pixel centres.
    ImageDraw.Draw(canvas).polygon([(side * x - 0.5, side * y - 0.5) for x, y in points], fill=fill)


def _compare(scene: Scene, blobs: tuple[Blob | None, ...]) -> dict[str, list[bool]]:
    """For each attribute that the scene says, whether each object has it if blobs[i] is object i."""
    pairs = list(zip(scene.objects, blobs, strict=True))
    right = {
        name: [blob is not None and getattr(blob, name) == getattr(wanted, name) for wanted, blob in pairs]
        for name in ("shape", "colour", "size")
    }
    said = [(wanted, blob) for wanted, blob in pairs if wanted.position is not None]
    if said:
        right["position"] = [blob is not None and blob.position == wanted.position for wanted, blob in said]
    if scene.relation is not None:
        first, second = blobs[:2]
        known = first is not None and second is not None and _relation(first, second)
        right["relation"] = [known == scene.relation]
    return right


def _relation(first: Blob, second: Blob) -> str | None:
    """Where the first blob is, seen from the second; None where they are too close to say."""
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) < MIN_RELATION_DISTANCE:
        return None
    return max(RELATIONS, key=lambda name: RELATIONS[name][0] * dx + RELATIONS[name][1] * dy)


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """4-connected components: (H, W) bool -> labels (H, W), 0 where the mask is False, and the area of each
    label in pixels, areas[0] = 0. Runs of each row are joined with those that touch them in the row above."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = (index.tolist() for index in np.nonzero(edges == 1))
    ends = np.nonzero(edges == -1)[1].tolist()
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    above = 0
    for run, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= starts[run]):
            above += 1
        touching = above
        while rows[touching] == row - 1 and starts[touching] < ends[run]:
            parent[root(touching)] = root(run)
            touching += 1
    labels = np.zeros(mask.shape, dtype=np.int32)
    areas = np.zeros(len(rows) + 1, dtype=np.int64)
    for run, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        label = root(run) + 1
        labels[row, start:end] = label
        areas[label] += end - start
    return labels, areas


def _measure(pixels: Pixels, labels: NDArray[np.int32], label: int, background: Pixels) -> Blob:
    top, left, alpha, contrast = _alpha(pixels, labels, label, background)
    x, y, area_px = _moments(alpha)
    height, width = labels.shape
    names, templates = _templates(round(4 * math.log2(area_px)))
    errors = ((templates - _normalised(alpha)) ** 2).sum(1)
    return Blob(
        x=(left + x + 0.5) / width,
        y=(top + y + 0.5) / height,
        area=area_px / (height * width),
        shape=names[int(np.argmin(errors))],
        colour=_nearest_name(background + contrast),
    )


def _alpha(
    pixels: Pixels, labels: NDArray[np.int32], label: int, background: Pixels
) -> tuple[int, int, Pixels, Pixels]:
    """The box around labels == label in (C, H, W) pixels: its top and left, in it how far each pixel has come
    from the background's colour to the blob's own (0 to 1), and the difference (C,) of these colours."""
    ys, xs = np.nonzero(labels == label)
    margin = 2  # soft edges reach out of the mask
    top, left = max(int(ys.min()) - margin, 0), max(int(xs.min()) - margin, 0)
    box = (slice(top, int(ys.max()) + margin + 1), slice(left, int(xs.max()) + margin + 1))
    inside = pixels[:, ys, xs] - background[:, None]
    strength = (inside**2).sum(0)
    # The half that differs most from the background is the interior, without soft edges.
    contrast = np.median(inside[:, strength >= np.median(strength)], axis=1)
    difference = pixels[:, *box] - background[:, None, None]
    alpha = np.clip(np.tensordot(contrast, difference, 1) / (contrast @ contrast), 0, 1)
    others = (labels[box] != label) & (labels[box] != 0)
    alpha[(alpha < 0.1) | others] = 0
    return top, left, alpha, contrast


def _moments(alpha: Pixels) -> tuple[float, float, float]:
    """Centre of mass (x, y) in pixels, and mass."""
    columns, rows = alpha.sum(0), alpha.sum(1)
    mass = float(rows.sum())
    return float(columns @ np.arange(len(columns))) / mass, float(rows @ np.arange(len(rows))) / mass, mass


def _normalised(alpha: Pixels) -> Pixels:
    """(PATCH**2,) bilinear samples in a window centred on a blob, as wide as twice the root of its area."""
    x, y, area_px = _moments(alpha)
    offsets = np.linspace(-1, 1, PATCH) * math.sqrt(area_px)
    padded = np.pad(alpha, 1)
    height, width = alpha.shape
    rows = np.clip(y + offsets + 1, 0, height + 0.999)
    columns = np.clip(x + offsets + 1, 0, width + 0.999)
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    down, across = (rows - top)[:, None], columns - left
    lines = padded[top] * (1 - down) + padded[top + 1] * down
    return (lines[:, left] * (1 - across) + lines[:, left + 1] * across).ravel()


@functools.lru_cache(maxsize=256)
def _templates(log_area: int) -> tuple[list[str], Pixels]:
    """What `_normalised` gives for each shape of 2**(log_area / 4) pixels, sharp and blurred."""
    area_px = 2 ** (log_area / 4)
    size_px = 2 * math.ceil(1.5 * math.sqrt(area_px)) + 6
    names, templates = [], []
    for shape, blur_px in itertools.product(SHAPES, TEMPLATE_BLURS_PX):
        samples = []
        for dx, dy in itertools.product((0.0, 0.5), repeat=2):  # where the centre lies within its pixel
            x, y = 0.5 + dx / size_px, 0.5 + dy / size_px
            pixels = coverage(shape, area_px / size_px**2, x, y, size_px, blur_px)
            labels = (pixels > np.max(pixels) / 2).astype(np.int32)
            samples.append(_normalised(_alpha(pixels[None], labels, 1, np.zeros(1))[2]))
        names.append(shape)
        templates.append(np.mean(samples, axis=0))
    return names, np.stack(templates)


def _palette(*names: str) -> Pixels:
    return np.array([{**COLOURS, **BACKGROUNDS}[name] for name in names], dtype=np.float32) / 255


def _nearest_name(colour: Pixels) -> str:
    names = (*COLOURS, *BACKGROUNDS)
    return names[int(np.argmin(((_palette(*names) - colour) ** 2).sum(-1)))]
