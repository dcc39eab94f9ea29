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
from t2i.generation.batch_size import BatchSize, fitting
from t2i.generation.names import check_folder, slug
from t2i.generation.recipes import RECIPE_KEY, read
from t2i.generation.text_to_image import (
    Drawing,
    Listener,
    Report,
    draw,
    draw_files,
    read_image,
    write_grid,
)
from t2i.interfaces import SampleRequest
from t2i.launch.ranks import ALONE, Rank


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
    precision = "32-true"

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []

    def generate(self, request: SampleRequest, progress=None) -> torch.Tensor:
        self.requests.append(request)
        rows = []
        for prompt, seed in zip(request.prompts, request.seeds, strict=True):
            generator = torch.Generator().manual_seed(1000 * len(prompt) + seed + request.height_px)
            rows.append(2 * torch.rand(3, request.height_px, request.width_px, generator=generator) - 1)
        return torch.stack(rows)


def drawing(asked: SampleRequest, **changes) -> Drawing:
    names = [f"{slug(prompt)}_{seed}.png" for prompt, seed in zip(asked.prompts, asked.seeds, strict=True)]
    given = {"request": asked, "sampling": FakeGenerator.sampling, "recipe": {"checkpoint": "runs/ä"}}
    return Drawing(**given | {"names": names} | changes)


def drawn(folder, *drawings, batch_size=2, generator=None, rank=ALONE, grid=False) -> Report:
    report = Report()
    sizes = BatchSize(batch_size, torch.device("cpu"))
    draw_files(generator or FakeGenerator(), drawings, folder, sizes, Listener(), report, rank)
    if grid:
        write_grid(folder, report.lines.values())
    return report


def pngs(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def manifest(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


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
    drawn(tmp_path, drawing(asked, recipe={"image": "start.png"}))
    assert recipe_of(tmp_path / "a_7.png")["strength"] == 0.6
    assert recipe_of(tmp_path / "a_7.png")["image"] == "start.png"


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
    drawn(tmp_path, drawing(request([prompt])))
    (name,) = pngs(tmp_path)
    assert recipe_of(tmp_path / name) == {
        "checkpoint": "runs/ä",
        "prompt": prompt,
        "seed": 7,
        "height_px": 4,
        "width_px": 6,
        "negative_prompt": "blur",
    }
    (line,) = manifest(tmp_path)
    assert (line["file"], line["prompt"], line["seed"]) == (name, prompt, 7)
    assert {**line["recipe"], "prompt": prompt, "seed": 7} == recipe_of(tmp_path / name)


def test_a_recipe_draws_its_picture_again(tmp_path):
    """From the file alone, and to the byte."""
    drawn(tmp_path / "first", drawing(request(PROMPTS)))
    (recipe,) = read(tmp_path / "first" / "dddd_10.png")
    del recipe["checkpoint"]
    again = SampleRequest(prompts=[recipe.pop("prompt")], seeds=[recipe.pop("seed")], **recipe)
    drawn(tmp_path / "again", drawing(again))
    assert pngs(tmp_path / "again") == {"dddd_10.png": pngs(tmp_path / "first")["dddd_10.png"]}


def test_what_is_there_is_not_drawn_again(tmp_path):
    drawn(tmp_path, drawing(request(PROMPTS)))
    before = pngs(tmp_path)
    (tmp_path / "ccc_9.png").unlink()
    half = before["bb_8.png"]
    (tmp_path / "bb_8.png").write_bytes(half[:-20])  # no file of ours is so; a copy may be
    generator = FakeGenerator()
    moved = drawing(request(PROMPTS), recipe={"checkpoint": "elsewhere"})
    report = drawn(tmp_path, moved, generator=generator)
    assert (report.total, report.there, report.drawn, report.whole) == (5, 3, 2, True)
    assert [prompt for part in generator.requests for prompt in part.prompts] == ["bb", "ccc"]
    assert pngs(tmp_path).keys() == before.keys() | {f"bb_8-{manifest(tmp_path)[1]['id'][:8]}.png"}
    assert [line["prompt"] for line in manifest(tmp_path)] == PROMPTS


def test_another_recipe_is_never_written_over(tmp_path):
    drawn(tmp_path, drawing(request(["a b", "a-b"], seeds=[1, 1]), recipe={"weights": "one"}), grid=True)
    before = pngs(tmp_path)
    assert len(before) == 3
    assert {"a-b_1.png", "grid.png"} < before.keys()
    other = drawing(request(["a b", "a-b"], seeds=[1, 1], height_px=6), recipe={"weights": "two"})
    assert drawn(tmp_path, other, grid=True).drawn == 2
    after = pngs(tmp_path)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    assert drawn(tmp_path, other, grid=True).there == 2  # under their other names
    assert pngs(tmp_path) == after
    assert len(manifest(tmp_path)) == 4
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a_7.png").write_bytes(b"not ours")
    drawn(tmp_path / "foreign", drawing(request(["a"])))
    assert (tmp_path / "foreign" / "a_7.png").read_bytes() == b"not ours"
    assert len(pngs(tmp_path / "foreign")) == 2


def test_a_fixed_name_that_is_taken(tmp_path):
    fixed = drawing(request(["a", "a"], seeds=[1, 1]), names=["0/0.png", "1/0.png"], is_fixed=True)
    assert drawn(tmp_path, fixed).drawn == 2
    assert drawn(tmp_path, fixed).there == 2
    other = dataclasses.replace(fixed, recipe={"weights": "two"})
    with pytest.raises(UserError, match=r"0/0\.png is there and is not the picture"):
        drawn(tmp_path, other)


def test_what_is_asked_for_twice_is_drawn_once(tmp_path):
    report = drawn(tmp_path, drawing(request(["a", "bb", "a"], seeds=[1, 1, 1])))
    assert (report.total, report.drawn, report.repeated) == (2, 2, 1)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_several_processes_draw_what_one_does(tmp_path, world):
    """Each picture once, in the same batches, and whoever is last finds all of them in the one manifest."""
    drawings = [drawing(request(PROMPTS)), drawing(request(PROMPTS, height_px=6), recipe={"weights": "b"})]
    generator = FakeGenerator()
    drawn(tmp_path / "one", *drawings, generator=generator)
    parts, whole, share = [], [], 0
    for rank in reversed(range(world)):
        own = FakeGenerator()
        report = drawn(tmp_path / "many", *drawings, generator=own, rank=Rank(rank, world))
        parts += [(part.prompts, part.height_px) for part in own.requests]
        whole.append(report.whole)
        share += report.drawn
    assert share == 10
    assert pngs(tmp_path / "one") == pngs(tmp_path / "many")
    assert sorted(parts) == sorted((part.prompts, part.height_px) for part in generator.requests)
    assert whole == [False] * (world - 1) + [True]
    assert manifest(tmp_path / "many") == manifest(tmp_path / "one")
    assert not list((tmp_path / "many").glob("manifest-*"))
    assert drawn(tmp_path / "many", *drawings, rank=Rank(0, 2)).drawn == 0


def test_each_of_several_processes_gets_some(tmp_path):
    """Where the number at a time is left open."""
    for rank in range(4):
        assert drawn(tmp_path, drawing(request(PROMPTS[:4])), batch_size=None, rank=Rank(rank, 4)).drawn == 1


def test_several_pictures_get_a_grid_of_their_own(tmp_path):
    report = drawn(tmp_path, drawing(request(PROMPTS * 2)), drawing(request(["f"], height_px=9)), grid=True)
    assert report.drawn == 11
    assert [each["prompt"] for each in read(tmp_path / "grid.png")] == [*PROMPTS * 2, "f"]
    assert [each["height_px"] for each in read(tmp_path / "grid.png")] == [4] * 10 + [9]
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 + 4 * (128 + 4), 4 + 3 * (9 + 4 + 3 * 13 + 4))


def test_one_picture_gets_no_grid(tmp_path):
    drawn(tmp_path, drawing(request(["a"])), grid=True)
    assert [*pngs(tmp_path)] == ["a_7.png"]


class Failing(FakeGenerator):
    """Comes to NaN for "bb" and to infinity for "dddd", and is stopped at "eeeee"."""

    def generate(self, request, progress=None):
        if "eeeee" in request.prompts:
            raise KeyboardInterrupt
        images = super().generate(request)
        for image, prompt in zip(images, request.prompts, strict=True):
            image[1, 2, 3] = {"bb": torch.nan, "dddd": torch.inf}.get(prompt, 0.0)
        return images


def test_pictures_that_are_not_finite_are_named_and_the_others_are_written(tmp_path):
    asked = request(PROMPTS[:4])
    report = drawn(tmp_path, drawing(asked), generator=Failing(), batch_size=3, grid=True)
    assert (report.drawn, report.whole) == (2, True)
    assert sorted(pngs(tmp_path)) == ["a_7.png", "ccc_9.png", "grid.png"]
    assert ["error" in line for line in manifest(tmp_path)] == [False, True, False, True]
    with pytest.raises(
        UserError, match=r"2 of 4 .* not finite .*'bb' seed 8, 'dddd' seed 10.*guidance_scale=2\.5"
    ):
        draw(Failing(), asked, 3, lambda done: None)


def test_what_was_finished_before_ctrl_c_stays_and_is_gone_on_from(tmp_path):
    asked = drawing(request(["a", "ccc", "eeeee"]))
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path, asked, generator=Failing(), batch_size=1)
    assert sorted(pngs(tmp_path)) == ["a_7.png", "ccc_8.png"]
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"id": "cut')  # a process that was killed
    report = drawn(tmp_path, asked, batch_size=1)
    assert (report.there, report.drawn) == (2, 1)
    assert [line["prompt"] for line in manifest(tmp_path)] == ["a", "ccc", "eeeee"]


def test_a_picture_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, file, format, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        drawn(tmp_path, drawing(request(["a"])))
    assert list(tmp_path.iterdir()) == []


class Large(FakeGenerator):
    """Has memory for two pictures."""

    error: RuntimeError

    def generate(self, request, progress=None):
        if len(request.prompts) > 2:
            self.requests.append(request)
            raise self.error
        return super().generate(request)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_where_memory_does_not_do_half_as_many_are_drawn(error, tmp_path):
    generator = Large()
    generator.error = error
    assert drawn(tmp_path, drawing(request(PROMPTS)), generator=generator, batch_size=16).drawn == 5
    assert [len(part.prompts) for part in generator.requests] == [5, 2, 2, 1]
    drawn(tmp_path / "one", drawing(request(PROMPTS)))
    assert (
        pngs(tmp_path / "one").items()
        <= {name.removeprefix("one/"): data for name, data in pngs(tmp_path).items()}.items()
    )


def test_as_many_as_fit():
    assert [fitting(100, free) for free in (50, 130, 250, 1000, 10**6)] == [1, 1, 2, 8, 64]


def test_a_folder_that_cannot_be_is_known_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").write_text("")
    generator = FakeGenerator()
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(UserError, match=r"file is not a folder"):
            drawn(folder, drawing(request(["a"])), generator=generator)
    assert generator.requests == []
    check_folder(tmp_path / "new" / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pixels_are_those_that_were_drawn(tmp_path):
    class Fixed(FakeGenerator):
        def generate(self, request, progress=None):
            return torch.tensor([-1.0, 0.0, 1.0, 5.0]).repeat(3, 2, 1)[None]

    drawn(tmp_path, drawing(request(["a"])), generator=Fixed())
    with Image.open(tmp_path / "a_7.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (4, 2))
        assert [picture.getpixel((x, 1)) for x in range(4)] == [(0,) * 3, (128,) * 3, (255,) * 3, (255,) * 3]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, on the left!", "a-red-circle-on-the-left"),
        ("../../etc/passwd", "etc-passwd"),
        ("  --x--  ", "x"),
        ("", "empty"),
        ("日本", "日本"),
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
