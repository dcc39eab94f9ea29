"""`t2i sample` with a file of prompts, with a recipe, in the layouts of scorers and in several processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from t2i.generation.prompts import read_prompts

FEW = ("--num-images", "1", "--steps", "1")


def pngs(folder: str = "samples") -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.png")}


def recipe_of(path: str) -> dict:
    with Image.open(path) as picture:
        return json.loads(picture.info["t2i"])


def jsonl(name: str, *entries: object) -> str:
    Path(name).write_text("".join(f"{json.dumps(each)}\n" for each in entries))
    return name


def test_a_file_of_text(t2i, ldm_file):
    Path("p.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n\n  a blue square \na caf\xe9\na red circle\n")
    result = t2i("sample", "--prompts-file", "p.txt", "--checkpoint", ldm_file, *FEW)
    assert sorted(pngs()) == ["a-blue-square_0.png", "a-red-circle_0.png", "grid.png"]
    assert result.sentence == ("t2i sample: 1 line of p.txt not drawn (line 4: it is not text in UTF-8).")
    assert "p.txt: 1 blank line is passed over." in result.out
    assert "1 picture was asked for more than once, and drawn once." in result.out


BROKEN = {
    "not json": ("{", "it is not JSON"),
    "no object": ([1], "an object such as"),
    "no prompt": ({"seed": 1}, "prompt among them"),
    "unknown key": ({"prompt": "a", "sed": 1}, "a key is 'sed'; allowed: prompt"),
    "text for a number": ({"prompt": "a", "seed": "1"}, "seed is '1'; allowed: a whole number"),
    "truth for a number": ({"prompt": "a", "seed": True}, "seed is True"),
    "none for a number": ({"prompt": "a", "width": None}, "width is None"),
    "surrogate": (r'{"prompt": "a \ud800 circle"}', "prompt is 'a \\ud800 circle'"),
    "below": ({"prompt": "a", "num_images": 0}, "num_images is 0; allowed: 1 or more"),
    "above": ({"prompt": "a", "height": 10**9}, "height is 1000000000; allowed: 1 to 16,384"),
    "seed": ({"prompt": "a", "seed": -1}, "seed is -1; allowed: 0 to"),
    "option": ({"prompt": "a", "sampling": {"stps": 2}}, "sampling.stps is not a known key"),
    "value": ({"prompt": "a", "sampling": {"steps": 0}}, "sampling.steps is 0"),
    "size": ({"prompt": "a", "height": 33}, "height is 33; allowed: multiples of 8"),
    "overflow": ({"prompt": "a", "sampling": {"steps": 10**400}}, "sampling.steps is 1000"),
    "long": ({"prompt": "a", "seed": "x" * 10**6}, "xxx ... xxx"),
}


def test_broken_lines_are_named_and_the_rest_runs(t2i, ldm_file, monkeypatch):
    monkeypatch.setattr("t2i.few.FEW", len(BROKEN))
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in BROKEN.values()]
    Path("p.jsonl").write_text("\n".join([*lines, json.dumps({"prompt": "good"})]))
    result = t2i("sample", "--prompts-file", "p.jsonl", "--checkpoint", ldm_file, *FEW)
    assert [*pngs()] == ["good_0.png"]
    assert f"{len(BROKEN)} lines of p.jsonl not drawn (line " in result.sentence
    said = result.out + result.err
    assert len(said) < 10_000
    for number, (_, words) in enumerate(BROKEN.values(), 1):
        assert re.search(rf"line {number}: .*{re.escape(words)}", said), (number, words, said)


def test_a_file_in_utf_16(t2i):
    """As Windows has it: a line beyond the first is UTF-8 with zero bytes."""
    Path("p.txt").write_bytes("a red circle\na blue square\n".encode("utf-16"))
    sentence = t2i("sample", "--prompts-file", "p.txt").sentence
    assert "No line of p.txt can be used (line 1: it holds zero bytes, as text in UTF-16 does" in sentence


def test_a_line_that_does_not_go_with_a_flag_breaks_alone(t2i, ldm_file):
    Image.new("RGB", (32, 32)).save("a.png")
    lines = ({"prompt": "a"}, {"prompt": "b", "height": 40, "width": 40}, {"prompt": "c", "height": 56})
    flags = ("--prompts-file", jsonl("p.jsonl", *lines), "--image", "a.png", "--checkpoint", ldm_file, *FEW)
    result = t2i("sample", *flags, "--extend", "top=40")
    assert "1 line of p.jsonl not drawn (line 2: --extend is 'top=40'; allowed: less" in result.sentence
    assert sorted(pngs()) == ["a_0.png", "c_0.png", "grid.png"]


def test_a_row_of_a_table_may_hold_what_no_csv_does(tmp_path):
    """A cell longer than Python's csv reads, and an end of line of old within one."""
    prompt = "a\rcat " + "x" * 200_000
    (tmp_path / "p.tsv").write_text(f"Prompt\tCategory\r\n{prompt}\tPets\r\n", newline="")
    found = read_prompts(tmp_path / "p.tsv")
    assert ([line.prompt for line in found.lines], found.broken) == ([prompt], {})


def test_no_line_can_be_used(t2i):
    Path("p.jsonl").write_text("{\n")
    sentence = t2i("sample", "--prompts-file", "p.jsonl").sentence
    assert "No line of p.jsonl can be used (line 1: it is not JSON" in sentence
    jsonl("last.jsonl", {"prompt": "a", "seed": 2**64 - 1})
    sentence = t2i("sample", "--prompts-file", "last.jsonl", "--num-images", "2").sentence
    assert "No line of last.jsonl can be used (line 1: seed is 18446744073709551615; allowed: 0" in sentence
    Path("empty.txt").write_text("\n\n")
    assert "empty.txt holds no prompt" in t2i("sample", "--prompts-file", "empty.txt").sentence


def test_lines_have_options_of_their_own_and_those_that_share_them_are_drawn_together(
    t2i, ldm_file, monkeypatch
):
    from t2i.families.generator import ModelGenerator

    asked, generate = [], ModelGenerator.generate

    def noted(self, request, progress=None):
        asked.append((list(request.prompts), self.sampling.steps, request.height_px, request.width_px))
        return generate(self, request, progress)

    monkeypatch.setattr(ModelGenerator, "generate", noted)
    name = jsonl(
        "p.jsonl",
        {"prompt": "a", "seed": 5, "num_images": 2},
        {"prompt": "b", "sampling": {"steps": 3}, "height": 40},
        {"prompt": "c", "negative_prompt": "blur"},
        {"prompt": "d"},
        {"prompt": "e", "height": 40, "sampling": {"steps": 3}, "seed": 9},
    )
    assert t2i("sample", "--prompts-file", name, "--checkpoint", ldm_file, *FEW).code == 0
    assert asked == [
        (["a", "a", "d"], 1, 32, 32),
        (["b", "e"], 3, 40, 32),
        (["c"], 1, 32, 32),
    ]
    assert sorted(pngs()) == [
        *("a_5.png", "a_6.png", "b_0.png", "c_0.png", "d_0.png", "e_9.png", "grid.png"),
    ]
    assert recipe_of("samples/c_0.png")["negative_prompt"] == "blur"
    assert recipe_of("samples/e_9.png")["sampling"]["steps"] == 3


def test_what_is_there_is_said_and_not_drawn_again(t2i, ldm_file):
    arguments = ("sample", "--prompt", "a", "--prompt", "b", "--checkpoint", ldm_file, *FEW)
    assert "already" not in t2i(*arguments).out
    before = pngs()
    out = t2i(*arguments).out
    assert "0 pictures are drawn in samples; 2 were there already." in out
    assert pngs() == before
    assert "1 picture is drawn in samples; 2 were there already." in t2i(*arguments, "--prompt", "c").out
    t2i(*arguments, "--guidance-scale", "3")  # another recipe
    assert before.items() <= pngs().items()
    assert len(pngs()) == len(before) + 1 + 1 + 2 + 1


@pytest.mark.parametrize("several", [False, True])
def test_a_recipe_makes_the_same_picture(t2i, ldm_file, several):
    """To the bit, where as many are drawn at a time; from another name of the same weights."""
    one = ("--batch-size", "1")
    drawn = ("--checkpoint", ldm_file, "--num-images", "3", "--steps", "2", "--width", "40", *one)
    t2i("sample", "--prompt", "a red circle", "--negative-prompt", "b", "--seed", "3", *drawn)
    before = pngs()
    source = "grid.png" if several else "a-red-circle_4.png"
    result = t2i("sample", "--recipe", f"samples/{source}", "--out", "again", *one)
    assert (result.code, result.err) == (0, "")
    if not several:
        before = {source: before[source]}
    assert pngs("again") == before
    Path("weights").symlink_to(Path(ldm_file).parent)
    other = f"weights/{Path(ldm_file).name}"
    t2i("sample", "--recipe", f"samples/{source}", "--checkpoint", other, "--out", "other", *one)
    for name in before:
        with Image.open(f"other/{name}") as one, Image.open(f"again/{name}") as two:
            assert one.tobytes() == two.tobytes()


def test_flags_change_a_recipe(t2i, ldm_file):
    t2i("sample", "--prompt", "a", "--checkpoint", ldm_file, *FEW, "--width", "40")
    t2i("sample", "--recipe", "samples/a_0.png", "--out", "b", "--prompt", "b", "--steps", "3", "--seed", "7")
    (name,) = pngs("b")
    old, new = recipe_of("samples/a_0.png"), recipe_of(f"b/{name}")
    assert new == old | {"prompt": "b", "seed": 7, "sampling": old["sampling"] | {"steps": 3}}
    t2i("sample", "--recipe", "samples/a_0.png", "--out", "c", "sampling.steps=4", "--num-images", "2")
    assert sorted(pngs("c")) == ["a_0.png", "a_1.png", "grid.png"]
    assert recipe_of("c/a_0.png") == old | {"sampling": old["sampling"] | {"steps": 4}}


def with_recipe(name: str, **changes: object) -> str:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("t2i", json.dumps(recipe_of("samples/a_0.png") | changes))
    with Image.open("samples/a_0.png") as picture:
        picture.save(name, pnginfo=info)
    return name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": "gone"}, ("names gone", "--checkpoint")),
        ({"checkpoint": ["a"]}, ("checkpoint in odd.png", "text")),
        ({"seed": "1; rm"}, ("seed in odd.png",)),
        ({"seed": -3}, ("seed is -3",)),
        ({"prompt": None}, ("prompt in odd.png",)),
        ({"height_px": 10**7}, ("height", "16,384")),
        ({"sampling": {"sampler": "os.system"}}, ("sampling.sampler", "os.system")),
        ({"sampling": {"_target_": "os.system"}}, ("sampling._target_", "another kind of model")),
        (
            {"sampling": {"noise_scale": 1.0, "steps": 2}},
            (
                "odd.png was drawn by another kind of model than ",
                "has no sampling.noise_scale; allowed: --checkpoint",
            ),
        ),
        ({"pictures": 5}, ("pictures",)),
        ({"precision": "evil"}, ("precision", "evil")),
        ({"strength": 0.5}, ("--strength",)),
    ],
)
def test_a_recipe_of_a_stranger(t2i, ldm_file, changes, words):
    t2i("sample", "--prompt", "a", "--checkpoint", ldm_file, *FEW)
    sentence = t2i("sample", "--recipe", with_recipe("odd.png", **changes)).sentence
    for word in words:
        assert word in sentence


def test_a_recipe_can_change_nothing_else(t2i, ldm_file):
    t2i("sample", "--prompt", "a", "--checkpoint", ldm_file, *FEW)
    odd = with_recipe("odd.png", out="elsewhere", device="cuda", family="x", runs_dir="/", overrides=["a=b"])
    assert t2i("sample", "--recipe", odd, "--out", "again").code == 0
    assert pngs("again") == {"a_0.png": pngs()["a_0.png"]}
    assert not Path("elsewhere").exists()
    odd = with_recipe("odd.png", weights="0" * 16)
    assert "was drawn with weights '0000000000000000'" in t2i("sample", "--recipe", odd, "--out", "b").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "absent.png"), ("--recipe is 'absent.png'",)),
        (("--recipe", "plain.png"), ("plain.png holds no recipe",)),
        (("--recipe", "plain.png", "--prompts-file", "p.txt"), ("--recipe", "--prompts-file")),
        (("--prompts-file", "absent.txt"), ("absent.txt", "cannot be read")),
        (("--prompts-file", "p.txt", "--prompt", "a"), ("--prompt", "--prompts-file")),
        (("--layout", "parti", "--prompt", "a"), ("--layout", "only with --prompts-file")),
        (("--layout", "geneval", "--prompts-file", "p.txt"), ("--prompts-file", ".jsonl")),
        (("--prompts-file", "bad.tsv"), ("bad.tsv, line 1", "Prompt")),
        ((), ("--prompt is not given", "--recipe")),
    ],
)
def test_one_sentence(t2i, arguments, words):
    Image.new("RGB", (4, 4)).save("plain.png")
    Path("p.txt").write_text("a\n")
    Path("bad.tsv").write_text("a\tb\n")
    sentence = t2i("sample", *arguments).sentence
    for word in words:
        assert word in sentence


def geneval_loads(folder: Path) -> list[tuple[str, str]]:
    """(prompt, picture) of all that a scorer of GenEval looks at: folders whose names are digits, in each one JSON
    value in metadata.jsonl, and of samples/ what begins with digits and .png."""
    found = []
    for entry in os.listdir(folder):
        if (folder / entry).is_dir() and entry.isdigit():
            metadata = json.loads((folder / entry / "metadata.jsonl").read_text())
            assert metadata["tag"]
            for name in os.listdir(folder / entry / "samples"):
                if re.match(r"\d+\.png", name):
                    found.append((metadata["prompt"], f"{entry}/samples/{name}"))
    return sorted(found, key=lambda each: each[1])


def test_the_layout_of_geneval(t2i, ldm_file, monkeypatch):
    entries = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
        {"tag": "counting", "include": [], "prompt": "two cups"},
        {"tag": "colors", "include": [], "prompt": "a bench"},
    ]
    name = jsonl("meta.jsonl", *entries)
    arguments = ("sample", "--prompts-file", name, "--layout", "geneval", "--checkpoint", ldm_file)
    assert t2i(*arguments, "--num-images", "2", "--steps", "1").code == 0
    assert geneval_loads(Path("samples")) == [
        *[("a bench", f"00000/samples/000{i}.png") for i in range(2)],
        *[("two cups", f"00001/samples/000{i}.png") for i in range(2)],
        *[("a bench", f"00002/samples/000{i}.png") for i in range(2)],
    ]
    assert json.loads(Path("samples/00000/metadata.jsonl").read_text()) == entries[0]
    assert "6 were there already" in t2i(*arguments, "--num-images", "2", "--steps", "1").out
    sentence = t2i(*arguments, "--num-images", "2", "--steps", "2").sentence
    assert "00000/samples/0000.png is there and is not the picture" in sentence
    monkeypatch.setattr("t2i_cli.sample.load", None)  # refused before that
    sentence = t2i(*arguments, "--num-images", "2", "--seed", "1").sentence
    assert "00000/samples/0000.png is there and is not the picture" in sentence


def test_the_layout_of_parti_prompts(t2i, ldm_file):
    """Pictures are found by the number of the row, from 0, at the beginning of their names."""
    table = 'Prompt\tCategory\tChallenge\tNote\na "red" circle\tShapes\tBasic\t\nbob\tPeople\tBasic\tx\n'
    Path("PartiPrompts.tsv").write_text(table)
    arguments = ("sample", "--prompts-file", "PartiPrompts.tsv", "--layout", "parti", *FEW)
    assert t2i(*arguments, "--checkpoint", ldm_file).code == 0
    rows = [row.split("\t") for row in Path("samples/PartiPrompts.tsv").read_text().splitlines()[1:]]
    drawn = {int(re.match(r"\d+", name)[0]): recipe_of(f"samples/{name}")["prompt"] for name in pngs()}
    assert drawn == {number: row[0] for number, row in enumerate(rows)} == {0: 'a "red" circle', 1: "bob"}


def test_a_long_file_says_little(t2i, ldm_file):
    words = " ".join(f"word{i}" for i in range(40))
    Path("p.txt").write_text("".join(f"{words} {i}\n" for i in range(30)))
    out = t2i("sample", "--prompts-file", "p.txt", "--checkpoint", ldm_file, *FEW).out
    assert out.count("is left out.") == 10
    assert "... and 20 more" in out
    assert "p.txt, line 1, has 42 tokens" in out


def test_larger_than_trained(t2i, ldm_file):
    out = t2i("sample", "--prompt", "a", "--checkpoint", ldm_file, *FEW, "--height", "64").out
    assert "64 x 32 px is larger than the 32 x 32 px of training" in out


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_a_precision_that_a_cpu_does_not_take(t2i, ldm_file, precision):
    arguments = ("--checkpoint", ldm_file, "--device", "cpu", "--precision", precision)
    sentence = t2i("sample", "--prompt", "a", *arguments).sentence
    assert f"--precision is '{precision}'; allowed: 32-true on a CPU" in sentence


def test_each_distinct_prompt_is_encoded_once(t2i, ldm_file, monkeypatch):
    """By an encoder that has learned with the model, too."""
    from t2i.text.learned import LearnedTextEncoder

    seen, forward = [], LearnedTextEncoder.forward
    monkeypatch.setattr(
        LearnedTextEncoder, "forward", lambda self, captions: seen.extend(captions) or forward(self, captions)
    )
    name = jsonl("p.jsonl", {"prompt": "a"}, {"prompt": "b", "num_images": 3}, {"prompt": "a", "seed": 9})
    result = t2i("sample", "--prompts-file", name, "--checkpoint", ldm_file, *FEW, "--batch-size", "2")
    assert result.code == 0
    assert sorted(seen) == ["", "a", "b"]


MANY = [{"prompt": f"number {i}", "height": 32 + 8 * (i % 2)} for i in range(7)]


def test_two_processes_draw_what_one_does(t2i, ldm_file, monkeypatch):
    arguments = ["sample", "--prompts-file", jsonl("p.jsonl", *MANY), "--checkpoint", ldm_file, *FEW]
    arguments += ["--batch-size", "2"]
    assert t2i(*arguments, "--out", "one").code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        result = t2i(*arguments, "--out", "two")
        assert result.code == 0
    assert pngs("one") == pngs("two")
    assert Path("one/manifest.jsonl").read_text() == Path("two/manifest.jsonl").read_text()
    assert "All 7 pictures are listed in two/manifest.jsonl." in result.out


@pytest.mark.slow
def test_two_processes_of_torchrun_of_which_one_speaks(t2i, ldm_file):
    arguments = ["sample", "--prompts-file", jsonl("p.jsonl", *MANY), "--checkpoint", ldm_file, *FEW]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["--log-dir=logs", "-m", "t2i_cli.main", *arguments, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(pngs()) == 8
    assert done.stdout.count("Drawing with") == 1
    assert "All 7 pictures are listed in samples/manifest.jsonl." in done.stdout


@pytest.mark.slow
def test_compiled_blocks_draw_nearly_the_same(t2i, ldm_file):
    arguments = ("sample", "--prompt", "a", "--checkpoint", ldm_file, *FEW)
    assert t2i(*arguments).code == 0
    assert t2i(*arguments, "--compile", "--out", "compiled").code == 0
    assert recipe_of("compiled/a_0.png")["compile"] is True
    with Image.open("samples/a_0.png") as one, Image.open("compiled/a_0.png") as two:
        assert max(abs(x - y) for x, y in zip(one.tobytes(), two.tobytes(), strict=True)) <= 1
