"""Several processes that draw into one folder at a time, and files that are in the way: nothing is written over."""

from __future__ import annotations

import errno
import os
import re
import weakref

import pytest
from PIL import Image
from test_generation_draw import PROMPTS, FakeGenerator, drawing, drawn, manifest, pngs, request

from t2i.errors import UserError
from t2i.files import written_whole
from t2i.generation.names import slug
from t2i.generation.prompts import read_prompts
from t2i.generation.strip import write_strip
from t2i.generation.video import write_film


class Meanwhile(FakeGenerator):
    """Before the first picture is drawn, another process does something."""

    def __init__(self, other) -> None:
        super().__init__()
        self.other = [other]

    def generate(self, request, progress=None):
        if self.other:
            self.other.pop()()
        return super().generate(request)


def other_weights():
    return drawing(request(PROMPTS), recipe={"weights": "two"})


def test_a_picture_that_another_process_wrote_meanwhile_stays(tmp_path):
    seen = {}

    def other():
        drawn(tmp_path, other_weights())
        seen.update(pngs(tmp_path))

    report = drawn(tmp_path, drawing(request(PROMPTS)), generator=Meanwhile(other))
    assert (report.drawn, report.there, report.whole) == (5, 0, True)
    after = pngs(tmp_path)
    assert len(seen) == 5
    assert len(after) == 10
    assert {name: after[name] for name in seen} == seen
    assert [line["file"] in after for line in report.lines.values()] == [True] * 5
    assert len({line["file"] for line in manifest(tmp_path)}) == 10


def test_a_picture_that_another_process_drew_by_the_same_recipe_is_there(tmp_path):
    same = drawing(request(PROMPTS))
    report = drawn(tmp_path, same, generator=Meanwhile(lambda: drawn(tmp_path, same)))
    assert (report.drawn, report.there, report.whole) == (0, 5, True)
    assert len(pngs(tmp_path)) == len(manifest(tmp_path)) == 5


def test_a_fixed_name_that_another_process_took_meanwhile(tmp_path):
    other = Meanwhile(lambda: drawn(tmp_path, other_weights()))
    with pytest.raises(UserError, match=r"a_7\.png is there and is not the picture"):
        drawn(tmp_path, drawing(request(PROMPTS), is_fixed=True), generator=other)


def test_the_manifest_lists_what_was_written_while_another_process_put_its_own_there(tmp_path):
    class Between(FakeGenerator):
        """The other process begins and ends between the second batch and the third."""

        def generate(self, asked, progress=None):
            if len(self.requests) == 2:
                drawn(tmp_path, drawing(request(["other"])))
            return super().generate(asked)

    report = drawn(tmp_path, drawing(request(PROMPTS)), generator=Between())
    assert [line["prompt"] for line in report.lines.values()] == PROMPTS
    assert [line["prompt"] for line in manifest(tmp_path)] == ["other", *PROMPTS]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_takes_no_others_place(tmp_path, monkeypatch, links):
    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted", str(source))

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "a"
    with written_whole(path, is_new=True) as unfinished:
        unfinished.write_text("one")
    with pytest.raises(FileExistsError, match=re.escape(str(path))):  # noqa: SIM117
        with written_whole(path, is_new=True) as unfinished:
            unfinished.write_text("two")
    assert path.read_text() == "one"
    assert [*tmp_path.iterdir()] == [path]


def test_a_film_takes_no_others_place(tmp_path):
    path = tmp_path / "video.webp"
    path.write_bytes(b"another")
    frames = [Image.new("RGB", (4, 6), color) for color in ("red", "blue")]
    first = write_film(frames, path, 40)
    assert path.read_bytes() == b"another"
    assert first != path
    assert write_film(frames, path, 40) == first
    assert write_film(frames[::-1], path, 40) not in (first, path)


def test_a_strip_opens_one_picture_at_a_time(tmp_path, monkeypatch):
    report = drawn(tmp_path, drawing(request(PROMPTS)))
    (tmp_path / "strip.webp").write_bytes(b"another")
    lines = [*report.lines.values()]
    still, film = write_strip(tmp_path, lines)
    assert (tmp_path / "strip.webp").read_bytes() == b"another"
    pictures = [Image.open(tmp_path / line["file"]) for line in lines]
    with Image.open(still) as sheet, Image.open(film) as moving:
        assert sheet.size == (30, 4)
        assert moving.n_frames == 5
        for i, picture in enumerate(pictures):
            assert sheet.crop((6 * i, 0, 6 * i + 6, 4)).tobytes() == picture.tobytes()
            moving.seek(i)
            assert moving.convert("RGB").tobytes() == picture.tobytes()
    assert write_strip(tmp_path, lines) == [still, film]
    del pictures, picture
    opened, alive, real = [], [], Image.open

    def counted(*arguments, **options):
        found = real(*arguments, **options)
        opened.append(weakref.ref(found))
        alive.append(sum(each() is not None for each in opened))
        return found

    monkeypatch.setattr(Image, "open", counted)
    (tmp_path / "again").mkdir()
    write_strip(tmp_path / "again", [{**line, "file": f"../{line['file']}"} for line in lines])
    assert len(alive) >= 10
    assert max(alive) <= 2


def test_prompts_in_any_script_have_names_of_their_own(tmp_path):
    prompts = ["日本", "красный круг", "żółw", "🎨", "🚀", "!"]
    names = [slug(prompt) for prompt in prompts]
    assert names[:3] == ["日本", "красный-круг", "żółw"]
    assert len(set(names)) == 6
    long = slug("木" * 100)
    assert long.startswith("木木")
    assert len(long.encode()) <= 60
    drawn(tmp_path, drawing(request([*prompts, "木" * 100])))
    assert len(pngs(tmp_path)) == 7


def test_halves_of_surrogates_break_their_line_alone(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a \\ud800 circle"}\n{"prompt": "b"}\n{"prompt": "c", "negative_prompt": "\\udfff"}\n'
    )
    found = read_prompts(path)
    assert [line.prompt for line in found.lines] == ["b"]
    assert found.broken.keys() == {1, 3}
    assert "negative_prompt" in found.broken[3]
    assert found.broken[1].isascii()


def test_a_row_of_a_table_keeps_its_empty_first_cell(tmp_path):
    path = tmp_path / "prompts.tsv"
    path.write_text("Category\tPrompt\r\n\ta red circle\r\nShapes\ta star\r\nShapes\t \r\n")
    found = read_prompts(path)
    assert [line.prompt for line in found.lines] == ["a red circle", "a star"]
    assert found.lines[0].entry == {"Category": "", "Prompt": "a red circle"}
    assert found.broken.keys() == {4}
