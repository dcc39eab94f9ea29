"""Suites of prompts, and what is counted of them."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from t2i.errors import DataError
from t2i.evaluation.attributes import Attributes
from t2i.evaluation.pictures import Item
from t2i.evaluation.prompts import check_scenes
from t2i.evaluation.suites import CATEGORIES, Prompt, read_suite
from t2i_pipelines.sources import shapes


def test_cocos_captions_are_one_of_each_picture(tmp_path):
    annotations = [{"image_id": i // 3, "caption": f" picture {i // 3}, way {i % 3}\n"} for i in range(30)]
    file = tmp_path / "captions_val2014.json"
    file.write_text(json.dumps({"images": [], "annotations": annotations}))
    prompts = read_suite(file, None)
    assert [prompt.text.partition(",")[0] for prompt in prompts] == [f"picture {i}" for i in range(10)]
    assert len({prompt.text[-1] for prompt in prompts}) > 1
    drawn = read_suite(file, 4)
    assert drawn == read_suite(file, 4) != read_suite(file, 4, seed=1)
    assert len({prompt.text for prompt in drawn} & {prompt.text for prompt in prompts}) == 4


def test_a_table_has_categories(tmp_path):
    file = tmp_path / "PartiPrompts.tsv"
    file.write_text(
        'Prompt\tCategory\tChallenge\tNote\n"bond"\tAbstract\tBasic\t\na cat\tAnimals\tBasic\tx\n'
    )
    assert read_suite(file, None) == [Prompt('"bond"', "Abstract"), Prompt("a cat", "Animals")]


def test_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a cat\r\n\n  a dog \n")
    assert read_suite(tmp_path / "a.txt", None) == [Prompt("a cat"), Prompt("a dog")]


def test_a_line_ends_where_the_file_says(tmp_path):
    """And not at each character that Python takes for an end of one; a cell may be longer than its csv reads."""
    prompt = "a\u2028cat\x85at " + "x" * 200_000 + "\rnight"
    (tmp_path / "a.txt").write_text(f"{prompt}\n", newline="")
    (tmp_path / "a.tsv").write_text(f"Prompt\tCategory\n{prompt}\tPets\n", newline="")
    assert read_suite(tmp_path / "a.txt", None) == [Prompt(prompt)]
    assert read_suite(tmp_path / "a.tsv", None) == [Prompt(prompt, "Pets")]


def test_objects_and_a_mark_of_the_byte_order(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "a cat", "seed": 1}\n\n{"prompt": "a\xe2\x80\xa8dog"}\n'
    )
    assert read_suite(tmp_path / "a.jsonl", None) == [Prompt("a cat"), Prompt("a\u2028dog")]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\n")
    assert read_suite(tmp_path / "a.txt", None) == [Prompt("a cat")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "{}", "is not COCO's captions"),
        ("a.json", "not json", "is not COCO's captions"),
        ("a.tsv", "Text\tCategory\nx\ty\n", r"has the columns \['Text', 'Category'\]; allowed: Prompt"),
        ("a.txt", "\n\n", "holds no prompt"),
        (
            "a.jsonl",
            '{"prompt": "a cat"}\n\n{"text": "a dog"}\n',
            r"a.jsonl, line 3, is .*; allowed: an object with a text",
        ),
        ("a.jsonl", "a cat\n", r"line 1, is 'a cat'; allowed: an object with a text"),
        ("a.jsonl", '{"prompt": 1}\n', r"line 1, is .*; allowed: an object with a text"),
        (
            "a.jsonl",
            '{"prompt": "\\ud800"}\n',
            r"has the prompt '\\ud800'; allowed: text that UTF-8 can hold",
        ),
        ("a.tsv", "Prompt\tCategory\nx\ty\n\tz\n", "line 3, has no text in the column Prompt"),
        ("a.csv", "a cat\n", r"a.csv ends in .csv; allowed: .json, .jsonl, .tsv or .txt"),
    ],
)
def test_what_is_no_suite_is_one_sentence(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_suite(tmp_path / name, None)


def composed_items(per_category: int, size_px: int = 64) -> list[Item]:
    rng = random.Random(0)
    return [
        Item(
            pil_to_tensor(shapes.render(scene, shapes.place(scene, rng), size_px)),
            text,
            {"scene": scene.to_json(), "category": category},
        )
        for category, text, scene in shapes.composition(per_category)
    ]


def test_the_compositional_suite_is_new_and_can_be_got_right():
    suite = shapes.composition(6)
    assert suite == shapes.composition(6)
    assert [category for category, _, _ in suite] == [name for name in CATEGORIES for _ in range(6)]
    assert all(shapes.is_heldout(item, scene.background) for _, _, scene in suite for item in scene.objects)
    attributes = Attributes(check_scenes)
    attributes.look(composed_items(6))
    found = {figure.name: figure.value for figure in attributes.figures()}
    assert found["exact"] >= 0.9
    assert {name for name in found if name.startswith("category")} == {
        f"category {name}" for name in CATEGORIES
    }
    assert all(found[f"category {name}"] >= 0.8 for name in CATEGORIES)


def test_a_category_asks_for_its_own_attributes_alone():
    """A picture in the wrong colour counts as the right number of shapes, in the wrong colour."""
    answers = {"count": True, "background": True, "shape": True, "colour": False, "size": True}
    attributes = Attributes(lambda images, metadata: [answers for _ in metadata])
    items = [
        Item(torch.zeros(3, 32, 32, dtype=torch.uint8), "", {"category": c}) for c in ("counts", "binding")
    ]
    attributes.look(items)
    found = {figure.name: (figure.value, figure.count) for figure in attributes.figures()}
    assert found["category counts"] == (1.0, 1)
    assert found["category binding"] == (0.0, 1)
    assert found["exact"] == (0.0, 2)
    assert found["attribute colour"] == (0.0, 2)
