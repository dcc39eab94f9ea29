"""The checker of scenes, calibrated on pictures whose content is known."""

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from t2i.evaluation.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    check,
    coverage,
    find_blobs,
    outline,
)
from t2i_pipelines.sources import shapes as source


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def draw(kind, count: int, size_px: int, seed: int = 0) -> tuple[list[Tensor], list[Scene]]:
    rng = random.Random(seed)
    scenes = [kind(rng) for _ in range(count)]
    return [to_tensor(source.render(s, source.place(s, rng), size_px)) for s in scenes], scenes


def blur(image: Tensor, sigma: float) -> Tensor:
    kernel = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / (2 * sigma**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(image[:, None], (4, 4, 4, 4), mode="replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def all_right(images: list[Tensor], scenes: list[Scene]) -> float:
    return sum(all(check(i, s).values()) for i, s in zip(images, scenes, strict=True)) / len(scenes)


KINDS = [source.random_one, source.random_two, source.random_alike]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size_px", "at_least"), [(32, 0.98), (64, 0.995), (96, 0.995)])
def test_real_pictures_have_all_attributes(kind, size_px, at_least):
    assert all_right(*draw(kind, 200, size_px)) >= at_least


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size_px", "sigma_px", "at_least"), [(32, 0.7, 0.95), (64, 1.2, 0.98)])
def test_blur_and_noise_are_tolerated(kind, size_px, sigma_px, at_least):
    images, scenes = draw(kind, 150, size_px)
    generator = torch.Generator().manual_seed(0)
    images = [blur(i, sigma_px) + 0.1 * torch.randn(i.shape, generator=generator) for i in images]
    assert all_right(images, scenes) >= at_least


@pytest.mark.parametrize("size_px", [32, 64])
def test_other_captions_score_what_they_share_with_the_picture(size_px):
    """With one object each, an attribute holds exactly where both scenes say the same word."""
    images, scenes = draw(source.random_one, 300, size_px)
    others = scenes[1:] + scenes[:1]
    shared = {"shape": [], "colour": [], "size": [], "position": [], "background": []}
    found = {name: [] for name in shared}
    for image, shown, wanted in zip(images, scenes, others, strict=True):
        answers = check(image, wanted)
        assert answers["count"]
        for name in shared:
            a, b = (scene if name == "background" else scene.objects[0] for scene in (shown, wanted))
            shared[name].append(getattr(a, name) == getattr(b, name))
            found[name].append(answers[name])
    chance = {"shape": 1 / 4, "colour": 1 / 7, "size": 1 / 2, "position": 1 / 9, "background": 1 / 4}
    for name in shared:
        assert np.mean(np.array(found[name]) == np.array(shared[name])) > 0.98
        assert np.mean(found[name]) == pytest.approx(chance[name], abs=0.08)


RED_LEFT_OF_BLUE = Scene(
    "white", (SceneObject("circle", "red", "large"), SceneObject("square", "blue", "large")), "left of"
)


def picture_of(scene: Scene, centres, size_px: int = 64) -> Tensor:
    return to_tensor(source.render(scene, centres, size_px))


def test_swapped_places_break_only_the_relation():
    answers = check(picture_of(RED_LEFT_OF_BLUE, [(0.75, 0.5), (0.25, 0.5)]), RED_LEFT_OF_BLUE)
    assert [name for name, holds in answers.items() if not holds] == ["relation"]


def test_swapped_colours_break_colour_or_shape_but_not_both():
    objects = (SceneObject("circle", "blue", "large"), SceneObject("square", "red", "large"))
    swapped = Scene("white", objects, "left of")
    answers = check(picture_of(swapped, [(0.25, 0.5), (0.75, 0.5)]), RED_LEFT_OF_BLUE)
    assert not (answers["colour"] and answers["shape"])
    assert answers["count"]
    assert answers["size"]
    assert answers["background"]


@pytest.mark.parametrize("centres", [[(0.25, 0.25)], [(0.2, 0.2), (0.8, 0.2), (0.5, 0.8)]])
def test_a_wrong_number_of_objects_fails_the_count(centres):
    item = SceneObject("circle", "green", "small")
    shown, wanted = Scene("black", (item,) * len(centres)), Scene("black", (item,) * 2)
    answers = check(picture_of(shown, centres), wanted)
    assert not answers["count"]
    # A missing object fails its words too; one too many does not.
    assert answers["colour"] == answers["shape"] == (len(centres) > 2)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_an_empty_picture_has_at_most_its_background(value):
    scene = Scene("white", (SceneObject("star", "red", "small", "top"),))
    answers = check(torch.full((3, 64, 64), value), scene)
    assert answers == {
        **dict.fromkeys(("count", "shape", "colour", "size", "position"), False),
        "background": value == 1.0,
    }


def test_noise_has_no_attributes_of_a_scene():
    generator = torch.Generator().manual_seed(0)
    _, scenes = draw(source.random_two, 50, 32)
    assert all_right([torch.randn(3, 64, 64, generator=generator) for _ in scenes], scenes) == 0


def test_a_picture_drawn_by_other_means_is_read_alike():
    """An oracle apart from our outlines: PIL's own ellipse and rectangle, of other sizes and colours."""
    picture = Image.new("RGB", (64, 64), "white")
    canvas = ImageDraw.Draw(picture)
    canvas.ellipse((4, 4, 20, 20), fill=(200, 40, 50))
    canvas.rectangle((38, 40, 48, 50), fill=(60, 90, 200))
    background, blobs, count = find_blobs(to_tensor(picture))
    words = {(b.colour, b.shape, b.size, b.position) for b in blobs}
    assert (background, count) == ("white", 2)
    assert words == {("red", "circle", "large", "top left"), ("blue", "square", "small", "bottom right")}
    circle = next(b for b in blobs if b.shape == "circle")
    assert (64 * circle.x, 64 * circle.y) == pytest.approx((12.5, 12.5), abs=0.1)
    assert 64**2 * circle.area == pytest.approx(np.pi * 8.5**2, rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_shapes_have_the_area_and_centre_they_are_drawn_with(shape, size):
    corners = np.array(outline(shape, SIZES[size], 0.4, 0.6))
    x, y = corners.T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y  # shoelace formula
    area = cross.sum() / 2
    centre = [((v + np.roll(v, -1)) * cross).sum() / (6 * area) for v in (x, y)]
    assert abs(area) == pytest.approx(SIZES[size])
    assert centre == pytest.approx([0.4, 0.6])
    drawn = coverage(shape, SIZES[size], 0.4, 0.6, 64)
    assert drawn.mean() == pytest.approx(SIZES[size], rel=0.12)  # PIL fills every pixel that an edge touches
    assert drawn.sum(0) @ (np.arange(64) + 0.5) / drawn.sum() / 64 == pytest.approx(0.4, abs=0.004)


def test_colours_are_far_apart():
    palette = np.array([*COLOURS.values(), *BACKGROUNDS.values()]) / 255
    distance = np.linalg.norm(palette[:, None] - palette[None], axis=-1) + 9 * np.eye(len(palette))
    assert distance.min() > 0.38


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_survives_json(kind):
    scene = kind(random.Random(0))
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
