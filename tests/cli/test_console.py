"""What is printed is what was said: names and captions hold no markup."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.table import Table

from t2i_cli.console import console, progress_bar, say_what_is_logged

TEXTS = ["a[/b].tar", "[red]a[/red]", "[bold]", "x[/]", "[link=http://a]b[/link]", ":cat: :100:", "[0-9]{2}"]


def test_a_bar_leaves_nothing_in_a_file(capsys):
    with progress_bar() as bar:
        bar.advance(bar.add_task("pictures", total=1))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_printed_as_they_are(text, capsys):
    console.print(f"{text} is in {Path(text)}")
    table = Table(text)
    table.add_row(text)
    console.print(table)
    say_what_is_logged()
    logging.getLogger("t2i.data").warning("%s is gone", text)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{text} is in {Path(text)}"
    assert sum(text in line for line in said[1:-1]) == 2
    assert said[-1] == f"{text} is gone"


def test_control_characters_are_spelt_and_a_line_stays_one(capsys):
    text = "a\x1b[31m\nb\r\x07\x9b2J\u202ec\té"
    spelt = r"a\x1b[31m\nb\r\x07\x9b2J\u202ec"
    console.print(text)
    table = Table("head", text)
    table.add_row(text, "x")
    console.print(table, width=200)
    say_what_is_logged()
    logging.getLogger("t2i.data").warning("%s", text)
    said = capsys.readouterr().out
    assert said.count(spelt) == 4
    assert not any(character in said for character in "\x1b\r\x07\x9b\u202e")


def test_an_error_is_one_line_whatever_it_names():
    command = [sys.executable, "-m", "t2i_cli.main", "data", "pack", "a\nb\x1b[31m.csv", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "t2i data pack: a\\nb\\x1b[31m.csv does not exist.\n"


def test_every_job_names_a_folder_in_brackets(tmp_path, capsys):
    from t2i_cli.data.index import run as index
    from t2i_cli.data.inspect import run as inspect
    from t2i_cli.data.pack import run as pack

    source, out = tmp_path / "in[red]", tmp_path / "out[/bold] :cat:"
    source.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text("[/i] a caption")
    pack([str(source), str(out)])
    index([f"{out}/00000.tar"])
    inspect([f"{out}/00000.tar", "--json", f"{out}/[b].json"])
    said = capsys.readouterr().out
    assert f"2 of 2 pictures packed in 1 shard in {out}" in said
    assert f"Wrote {out}/[b].json" in said


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_a_terminal_cannot_show_are_spelt(encoding):
    """A file's name need not be UTF-8, and a terminal's encoding may be narrow."""
    code = "from t2i_cli.console import console; console.print('a' + chr(0xDC80 + 0x69) + ' █')"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": encoding, "PATH": ""}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(b"a\\udce9 ")


def test_output_that_is_no_file_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console.print("[x]")
    assert sys.stdout.getvalue() == "[x]\n"
