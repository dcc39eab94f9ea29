"""Drawing in batches, and PNG files that hold the recipe they were made by."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from t2i.errors import UserError
from t2i.generation.text_to_image import (
    RECIPE_KEY,
    check_folder,
    draw,
    draw_files,
    read_image,
    save,
    save_grid,
    slug,
    unused,
)
from t2i.interfaces import SampleRequest


def request(prompts: list[str], **changes) -> SampleRequest:
    values = {
        "prompts": prompts,
        "seeds": range(7, 7 + len(prompts)),
        "height_px": 4,
        "width_px": 6,
        "negative_prompt": "blur",
    }
    return SampleRequest(**values | changes)


class FakeGenerator:
    """Pictures that depend on prompt and seed alone, as the Protocol asks; remembers what it was asked."""

    default_size_px = 4
    sampling = SimpleNamespace(steps=3, guidance_scale=2.5)

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []

    def generate(self, request: SampleRequest, progress=None) -> torch.Tensor:
        self.requests.append(request)
        rows = []
        for prompt, seed in zip(request.prompts, request.seeds, strict=True):
            generator = torch.Generator().manual_seed(1000 * len(prompt) + seed)
            rows.append(2 * torch.rand(3, request.height_px, request.width_px, generator=generator) - 1)
        return torch.stack(rows)


PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_change_nothing(batch_size):
    whole, generator, steps = FakeGenerator().generate(request(PROMPTS)), FakeGenerator(), []
    images = draw(generator, request(PROMPTS), batch_size, steps.append)
    assert torch.equal(images, whole)
    assert images.shape == (5, 3, 4, 6)
    assert sum(steps) == 5
    assert steps == [len(part.prompts) for part in generator.requests]
    assert all(len(part.prompts) <= batch_size for part in generator.requests)


def test_every_batch_gets_the_rest_of_the_request():
    generator, asked = FakeGenerator(), request(PROMPTS)
    draw(generator, asked, 2, lambda done: None)
    for part in generator.requests:
        assert dataclasses.replace(part, prompts=PROMPTS, seeds=asked.seeds) == asked


def test_every_batch_gets_its_own_start_pictures():
    images = torch.rand(5, 3, 4, 6)
    generator, asked = FakeGenerator(), request(PROMPTS, image=images)
    draw(generator, asked, 2, lambda done: None)
    assert torch.equal(torch.cat([part.image for part in generator.requests]), images)


def test_a_start_picture_is_cut_to_fit_and_stays_out_of_the_recipe(tmp_path):
    picture = Image.new("RGB", (60, 24), "red")
    picture.paste("blue", (12, 0, 48, 24))  # all that is left after the cut to 36 x 24, resized to 18 x 12
    picture.save(tmp_path / "start.png")
    image = read_image(tmp_path / "start.png", (12, 18))
    assert image.shape == (3, 12, 18)
    inner = image[..., 2:-2]  # the filter reaches two pixels into the red
    assert torch.equal(inner, torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(inner.shape))
    asked = request(["a"], image=image[None], strength=0.6)
    (path,) = save(FakeGenerator().generate(asked), asked, tmp_path, {"image": "start.png"})
    assert recipe_of(path)["strength"] == 0.6
    assert recipe_of(path)["image"] == "start.png"


def test_what_is_no_start_picture(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    for name in ("notes.txt", "absent.png", "."):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            read_image(tmp_path / name, (4, 6))


def recipe_of(path) -> dict:
    with Image.open(path) as picture:
        return json.loads(picture.text[RECIPE_KEY])


@pytest.mark.parametrize("prompt", ["a red circle", "", 'żółw "2" \\ 日本 🎨\n<b>&', "x" * 500])
def test_a_picture_holds_its_recipe(tmp_path, prompt):
    asked = request([prompt])
    (path,) = save(FakeGenerator().generate(asked), asked, tmp_path, {"checkpoint": "runs/ldm/ä"})
    assert path.parent == tmp_path
    assert recipe_of(path) == {
        "checkpoint": "runs/ldm/ä",
        "prompt": prompt,
        "seed": 7,
        "height_px": 4,
        "width_px": 6,
        "negative_prompt": "blur",
    }


def test_a_recipe_draws_its_picture_again(tmp_path):
    """From the file alone, and to the byte."""
    asked = request(PROMPTS)
    paths = save(draw(FakeGenerator(), asked, 2, lambda done: None), asked, tmp_path, {})
    recipe = recipe_of(paths[3])
    again = SampleRequest(prompts=[recipe.pop("prompt")], seeds=[recipe.pop("seed")], **recipe)
    (copy,) = save(FakeGenerator().generate(again), again, tmp_path / "again", {})
    assert copy.name == paths[3].name
    assert copy.read_bytes() == paths[3].read_bytes()


def test_several_pictures_get_a_grid(tmp_path):
    asked = request(PROMPTS * 2)
    paths = list(draw_files(FakeGenerator(), asked, 3, tmp_path, {"checkpoint": "c"}, lambda done: None))
    assert len(paths) == len(set(paths)) == 11
    assert paths[-1].name == "grid.png"
    recipe = recipe_of(paths[-1])
    assert (recipe["prompts"], recipe["seeds"]) == (PROMPTS * 2, list(range(7, 17)))
    assert recipe["checkpoint"] == "c"
    with Image.open(paths[-1]) as picture:
        assert picture.size == (8 * 6 + 7 * 2, 2 * 4 + 2)  # 8 columns, gaps of 2 px


def test_one_picture_gets_no_grid(tmp_path):
    paths = draw_files(FakeGenerator(), request(["a"]), 3, tmp_path, {}, lambda done: None)
    assert [path.name for path in paths] == ["a_7.png"]


class Failing(FakeGenerator):
    """Comes to NaN for "bb" and to infinity for "dddd", and is stopped at "eeeee"."""

    def generate(self, request):
        if "eeeee" in request.prompts:
            raise KeyboardInterrupt
        images = super().generate(request)
        for image, prompt in zip(images, request.prompts, strict=True):
            image[1, 2, 3] = {"bb": torch.nan, "dddd": torch.inf}.get(prompt, 0.0)
        return images


def test_pictures_that_are_not_finite_are_named_and_the_others_are_written(tmp_path):
    asked = request(PROMPTS[:4])
    with pytest.raises(
        UserError, match=r"2 of 4 .* not finite .*'bb' seed 8, 'dddd' seed 10.*guidance_scale=2\.5"
    ):
        list(draw_files(Failing(), asked, 3, tmp_path, {}, lambda done: None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_7.png", "ccc_9.png", "grid.png"]
    assert recipe_of(tmp_path / "grid.png")["seeds"] == [7, 9]
    with pytest.raises(UserError, match="2 of 4 pictures"):
        draw(Failing(), asked, 3, lambda done: None)


def test_what_was_finished_before_ctrl_c_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        list(draw_files(Failing(), request(["a", "ccc", "eeeee"]), 1, tmp_path, {}, lambda done: None))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_7.png", "ccc_8.png"]


def test_a_picture_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, file, format, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(torch.zeros(1, 3, 4, 6), request(["a"]), tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_known_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").write_text("")
    generator = FakeGenerator()
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UserError, match=r"file is not a folder"):
            list(draw_files(generator, request(["a"]), 1, folder, {}, lambda done: None))
    assert generator.requests == []
    check_folder(tmp_path / "new" / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pixels_are_those_that_were_drawn(tmp_path):
    image = torch.tensor([-1.0, 0.0, 1.0, 5.0]).repeat(3, 2, 1)[None]
    (path,) = save(image, request(["a"]), tmp_path, {})
    with Image.open(path) as picture:
        assert (picture.mode, picture.size) == ("RGB", (4, 2))
        assert [picture.getpixel((x, 1)) for x in range(4)] == [(0,) * 3, (128,) * 3, (255,) * 3, (255,) * 3]


def test_no_file_is_written_over(tmp_path):
    asked = request(["a b", "a-b"], seeds=[1, 1])  # the same name
    first = [*save(FakeGenerator().generate(asked), asked, tmp_path, {})]
    first.append(save_grid(FakeGenerator().generate(asked), asked, tmp_path, {}))
    before = {path: path.read_bytes() for path in first}
    second = [*save(torch.zeros(2, 3, 4, 6), asked, tmp_path, {})]
    second.append(save_grid(torch.zeros(2, 3, 4, 6), asked, tmp_path, {}))
    assert not set(first) & set(second)
    assert {path: path.read_bytes() for path in first} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-b_1-2.png",
        "a-b_1-3.png",
        "a-b_1-4.png",
        "a-b_1.png",
        "grid-2.png",
        "grid.png",
    ]


def test_numbers_must_agree(tmp_path):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        save(torch.zeros(1, 3, 4, 6), request(["a", "b"]), tmp_path, {})


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, on the left!", "a-red-circle-on-the-left"),
        ("../../etc/passwd", "etc-passwd"),
        ("  --x--  ", "x"),
        ("", "empty"),
        ("日本", "empty"),
        ("a" * 58 + " b", "a" * 58 + "-b"),
    ],
)
def test_slug(prompt, name):
    assert slug(prompt) == name


def test_long_prompts_with_the_same_beginning_have_names_of_their_own():
    names = {slug(f"{'a photo of a red fox ' * 5}{end}") for end in ("at dawn", "at dusk", "At dusk")}
    assert len(names) == 3
    assert all(len(name) == 60 and name == name.lower() for name in names)
    assert slug("b " * 100) == slug("b " * 100)


def test_unused(tmp_path):
    path = tmp_path / "a.b.png"
    assert unused(path) == path
    path.touch()
    assert unused(path).name == "a.b-2.png"
    (tmp_path / "a.b-2.png").touch()
    assert unused(path).name == "a.b-3.png"
