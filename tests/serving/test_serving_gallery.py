"""A gallery is searched by words and by likeness; what is not its own is never shown."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from t2i.errors import ConfigError
from t2i.generation.recipes import RECIPE_KEY
from t2i.serving.gallery import VECTORS, Features, Gallery
from t2i.training.pictures import save_png

COLOURS = {
    "red": (1.0, -1.0, -1.0),
    "crimson": (0.7, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
}


@pytest.fixture
def folder(tmp_path):
    for colour, values in COLOURS.items():
        image = torch.tensor(values)[:, None, None].expand(3, 8, 8)
        save_png(
            image, tmp_path / f"{colour}.png", **{RECIPE_KEY: json.dumps({"prompt": f"{colour}", "seed": 0})}
        )
    return tmp_path


def names(found) -> list[str]:
    return [each.path.stem for each in found]


def test_words_come_first_and_then_what_means_the_same(features, folder):
    found = names(Gallery(folder, features).search("red", 10))
    assert found[:2] == ["red", "crimson"]
    assert len(found) == 4
    assert names(Gallery(folder, features).search("red", 1)) == ["red"]


@pytest.mark.parametrize("text", ['{"prompt": "\\ud800"}', '{"prompt": "red", "strength": NaN}'])
def test_a_recipe_that_no_answer_can_hold_is_no_picture_of_ours(folder, text):
    save_png(torch.zeros(3, 8, 8), folder / "stranger.png", **{RECIPE_KEY: text})
    assert set(names(Gallery(folder, None).search("", 10))) == set(COLOURS)


def test_without_networks_words_alone_are_looked_for(folder):
    gallery = Gallery(folder, None)
    assert names(gallery.search("RED", 10)) == ["red"]
    assert set(names(gallery.search("", 10))) == set(COLOURS)
    with pytest.raises(ConfigError, match="pip install"):
        gallery.like(gallery.get("red.png"), 3)


def test_likeness_is_of_the_pictures(features, folder):
    gallery = Gallery(folder, features)
    assert names(gallery.like(gallery.get("red.png"), 2)) == ["red", "crimson"]
    assert names(gallery.like(torch.tensor((-1.0, 0.8, -1.0))[:, None, None].expand(3, 4, 4), 1)) == ["green"]


def test_clip_finds_what_pictures_show(small_clip, tmp_path):
    """In the order of the cosines that transformers computes; what has the words in its prompt comes first."""
    from transformers import CLIPModel, CLIPProcessor

    from t2i_cli.serve import clip_features

    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        generator = torch.Generator().manual_seed(i)
        image = torch.rand(3, 4, 4, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
        prompt = "a fox" if i == 3 else "no word of it"
        save_png(2 * image - 1, path, **{RECIPE_KEY: json.dumps({"prompt": prompt, "seed": i})})
    gallery = Gallery(tmp_path, clip_features(str(small_clip), torch.device("cpu")))

    processor = CLIPProcessor.from_pretrained(small_clip)
    pictures = [Image.open(path) for path in paths]
    inputs = processor(
        text=["a dog in the snow", "a fox"], images=pictures, return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        out = CLIPModel.from_pretrained(small_clip).eval()(**inputs)
    orders = out.logits_per_text.argsort(dim=1, descending=True).tolist()
    assert orders[0] != orders[1]
    assert names(gallery.search("a dog in the snow", 10)) == [str(i) for i in orders[0]]
    assert names(gallery.search("a fox", 10)) == ["3", *(str(i) for i in orders[1] if i != 3)]
    alike = out.image_embeds @ out.image_embeds[2]
    assert names(gallery.like(gallery.get("2.png"), 10)) == [
        str(i) for i in alike.argsort(descending=True).tolist()
    ]


def test_vectors_are_computed_once_and_kept(features, folder):
    Gallery(folder, features).search("red green", 1)
    calls = []

    def counted(prompts):
        calls.append(len(prompts))
        return features.of_prompts(prompts)

    again = Gallery(folder, Features(counted, features.of_pictures, 4, features.name))
    assert names(again.search("crimson", 2)) == ["crimson", "red"]
    assert calls == [1]  # what was searched for
    other = Gallery(folder, Features(counted, features.of_pictures, 4, "another network"))
    other.search("crimson", 2)
    assert calls == [1, 1, 3]  # those of another network are not taken


def test_a_damaged_file_of_vectors_is_made_anew(features, folder):
    (folder / VECTORS).write_bytes(b"nothing")
    assert names(Gallery(folder, features).search("blue", 1)) == ["blue"]
    assert names(Gallery(folder, features).search("crimson", 2)) == ["crimson", "red"]


def test_a_damaged_picture_ends_no_search(features, folder):
    path = folder / "blue.png"
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT") + 8
    data[place : place + 8] = bytes(8)
    path.write_bytes(data)
    gallery = Gallery(folder, features)
    assert names(gallery.like(gallery.get("red.png"), 2)) == ["red", "crimson"]


@pytest.mark.parametrize("recipe", [None, "no json", "[1]", '{"seed": 3}', "[" * 100_000])
def test_other_files_are_left_out(features, folder, recipe):
    info = PngInfo()
    if recipe is not None:
        info.add_itxt(RECIPE_KEY, recipe)
    Image.new("RGB", (4, 4)).save(folder / "other.png", pnginfo=info)
    (folder / "text.png").write_text("no picture")
    assert set(names(Gallery(folder, features).all())) == set(COLOURS)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "", "other.png", ".search.safetensors"])
def test_no_other_file_is_given_out(features, folder, name):
    Gallery(folder, features).search("red", 1)
    with pytest.raises(ConfigError, match="picture of the gallery"):
        Gallery(folder, features).get(name)


def test_what_was_deleted_is_not_shown(features, folder):
    gallery = Gallery(folder, features)
    assert len(gallery.all()) == 4
    (folder / "red.png").unlink()
    assert "red" not in names(gallery.all())
