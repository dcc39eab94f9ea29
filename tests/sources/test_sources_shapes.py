"""The shapes source: what it writes, what it holds out, and that captions say what is drawn."""

import io
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from t2i.errors import DataError
from t2i.evaluation.shapes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    check,
    outline,
)
from t2i_pipelines.sources import shapes

KINDS = [shapes.random_one, shapes.random_two, shapes.random_alike]


def read(directory: Path) -> list[tuple[str, dict, Image.Image]]:
    found = wds.WebDataset([str(p) for p in sorted(directory.glob("*.tar"))], shardshuffle=False)
    return [(s["txt"].decode(), json.loads(s["json"]), Image.open(io.BytesIO(s["png"]))) for s in found]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("shapes") / "set"
    shapes.build(directory, num_train=1100, num_heldout_one=100, num_heldout_two=50, size_px=48)
    return directory


def test_each_picture_shows_its_scene(built):
    for folder, count in (("train", 1100), ("heldout", 150)):
        samples = read(built / folder)
        assert len(samples) == count
        for caption, description, picture in samples:
            assert picture.size == (48, 48)
            scene = Scene.from_json(description["scene"])
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1
            assert all(check(image, scene).values()), caption
            assert description["unseen"] is (folder == "heldout")


def test_captions_say_each_attribute(built):
    for caption, description, _ in read(built / "train") + read(built / "heldout"):
        words = description["attributes"]
        assert f"{words['background']} background" in caption
        said = zip(*(words[name].split(", ") for name in ("size", "colour", "shape")), strict=True)
        for size, colour, shape in said:
            assert f"{size} {colour} {shape}" in caption
        if "position" in words:
            assert words["position"] in caption
        if "relation" in words:
            synonym = {"above": "over", "below": "under"}.get(words["relation"], words["relation"])
            assert words["relation"] in caption or synonym in caption
        elif words["count"] != "1":
            assert f"{ {'2': 'two', '3': 'three'}[words['count']] } " in caption
            assert words["shape"].split(", ")[0] + "s" in caption


def test_relation_is_said_from_the_first_object_to_the_second(built):
    for caption, description, _ in read(built / "train"):
        scene = Scene.from_json(description["scene"])
        if scene.relation is not None:
            places = [caption.index(f"{o.size} {o.colour} {o.shape}") for o in scene.objects]
            assert places[0] < places[1]


def test_heldout_combinations_are_never_trained_on(built):
    def combinations(folder: str):
        for _, description, _ in read(built / folder):
            background = description["scene"]["background"]
            for item in description["scene"]["objects"]:
                yield item["shape"], item["colour"], background, item["position"]

    train, heldout = set(combinations("train")), set(combinations("heldout"))
    assert not train & heldout
    # An unseen scene is unseen by its background or by its position.
    backgrounds = {c[:3] for c in train}
    positions = {(*c[:2], c[3]) for c in train}
    assert all(c[:3] not in backgrounds or (*c[:2], c[3]) not in positions for c in heldout)


def test_every_pair_of_attributes_is_trained_on():
    seen: dict[tuple[int, int], set] = {pair: set() for pair in itertools.combinations(range(4), 2)}
    vocabulary = (SHAPES, tuple(COLOURS), tuple(BACKGROUNDS), POSITIONS)
    for words in itertools.product(*vocabulary):
        shape, colour, background, position = words
        if not shapes.is_heldout(SceneObject(shape, colour, "small", position), background):
            for one, other in seen:
                seen[one, other].add((words[one], words[other]))
    for one, other in seen:
        assert seen[one, other] == set(itertools.product(vocabulary[one], vocabulary[other]))


def test_the_seed_decides_every_byte(tmp_path):
    arguments = {"num_train": 20, "num_heldout_one": 4, "num_heldout_two": 2, "size_px": 32}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shapes.build(tmp_path / name, **arguments, seed=seed)
    content = {
        name: [(tmp_path / name / folder / "00000.tar").read_bytes() for folder in ("train", "heldout")]
        for name in "abc"
    }
    assert content["a"] == content["b"]
    assert content["a"][0] != content["c"][0]
    assert content["a"][1] != content["c"][1]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_stay_inside_and_apart(kind):
    """No corner is outside, and no two objects drawn alone share a pixel."""
    rng = random.Random(0)
    for _ in range(200):
        scene = kind(rng)
        covered = np.zeros((64, 64), dtype=int)
        for item, centre in zip(scene.objects, shapes.place(scene, rng), strict=True):
            alone = np.array(shapes.render(Scene(scene.background, (item,)), [centre], 64), dtype=int)
            covered += np.abs(alone - BACKGROUNDS[scene.background]).sum(-1) > 0
            corners = outline(item.shape, SIZES[item.size], *centre)
            assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y in corners)
        assert covered.max() == 1


def test_a_picture_too_small_for_the_checker_is_refused(tmp_path):
    with pytest.raises(DataError, match="size_px is 16; allowed: 32 or more"):
        shapes.build(tmp_path / "set", size_px=16)
    assert list(tmp_path.iterdir()) == []
