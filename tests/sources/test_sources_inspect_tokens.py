"""Captions that a text encoder would cut are counted, by its own tokenizer."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from t2i.errors import CheckpointError, ConfigError
from t2i_cli.data.inspect import run
from t2i_pipelines.inspecting.facts import CUT

WORDS = (3, 8, 9, 40)


@pytest.fixture
def shard(tmp_path) -> str:
    """Captions of so many words."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for words in WORDS:
            for ending, content in (("png", picture.getvalue()), ("txt", b"cat " * words)):
                info = tarfile.TarInfo(f"{words:03d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(tmp_path / "0.tar")


def test_captions_that_are_cut_are_counted_and_named(shard, tmp_path, capsys):
    """The learned encoder reads a start token and one for each word."""
    place = tmp_path / "deep/facts.json"
    run([shard, "--text", "learned", "text.max_tokens=9", "--json", str(place)])
    said = capsys.readouterr().out
    assert f"Samples, {CUT}: 2, such as {shard}: 009 with 10" in said
    facts = json.loads(place.read_text())
    assert facts["caption"]["tokens"]["p99"] == 41
    assert facts["flaws"] == {
        CUT: {"samples": 2, "first": [f"{shard}: 009 with 10", f"{shard}: 040 with 41"]}
    }


def test_the_clip_of_a_folder_that_has_no_weights(shard, tmp_path, capsys):
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTokenizer

    theirs = SimpleTokenizer()
    specials = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {specials.get(token, token): i for token, i in theirs.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks)).save_pretrained(tmp_path / "clip")
    CLIPTextConfig().save_pretrained(tmp_path / "clip")
    run([shard, "--text", "clip", f"text.model={tmp_path / 'clip'}", "text.max_tokens=11"])
    assert f"{CUT}: 1, such as {shard}: 040 with 42" in capsys.readouterr().out


def test_what_cannot_be_counted_is_refused_at_once(shard, tmp_path):
    (tmp_path / "file").write_text("x")
    for arguments, error, words in (
        (["--text", "no-such"], ConfigError, "no-such does not exist; allowed for text: clip, "),
        (["--text", "5"], ConfigError, "text=5: a choice is a name"),
        (
            ["--text", "learned", "text.max_tokens=1"],
            ConfigError,
            r"text\.max_tokens is 1; allowed: 2 or more",
        ),
        (["--text", "learned", "text.nothing=1"], ConfigError, r"text\.nothing is not a known key"),
        (
            ["text.max_tokens=9"],
            ConfigError,
            r"is given without --text; allowed: --text NAME text\.key=value",
        ),
        (["--text", "clip", f"text.model={tmp_path}"], CheckpointError, "cannot be loaded|in its tokenizer"),
        (["--json", str(tmp_path / "file/a.json")], FileExistsError, "file"),
        (["--sheet", str(tmp_path)], IsADirectoryError, str(tmp_path)),
    ):
        with pytest.raises(error, match=words):
            run([shard, *arguments])
    assert {Path(path).name for path in tmp_path.iterdir()} == {"0.tar", "file"}
