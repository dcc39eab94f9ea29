"""A `pipe:` command runs where the command line names it, and never because a file does."""

from __future__ import annotations

import importlib

import pyarrow as pa
import pytest
from data_configs import data_config
from open_shards import take

from t2i.data.selection import listed
from t2i.data_config import MixturePart
from t2i.errors import ConfigError, DataError
from t2i_cli import train
from t2i_cli.composition import composed_run
from t2i_pipelines.filtering.repack import repack
from t2i_pipelines.selection import write_selection

REFUSED = "a command is run only where the command line itself names it"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def selection(shard, tmp_path):
    """kept.arrow with a shard and a command that leaves a mark, and the command."""
    path = shard(0, 4)
    pipe = f"pipe:touch {tmp_path}/ran; cat {path}"
    kept = tmp_path / "kept.arrow"
    write_selection(kept, [str(path), pipe], [pa.array(["000000001"]), pa.array(["000000002"])])
    return kept, pipe


def test_a_selection_runs_no_command(selection, tmp_path):
    kept, pipe = selection
    mixture = {"a": MixturePart(shards=str(kept)), "b": MixturePart(shards=str(tmp_path / "00000.tar"))}
    for data in (
        data_config(shards=str(kept), max_bad_share=1.0),
        data_config(shards=[str(tmp_path / "00000.tar"), str(kept)], max_bad_share=1.0),
        data_config(shards=None, mixture=mixture, max_bad_share=1.0),
    ):
        with pytest.raises(DataError, match=REFUSED) as error:
            take(data, 1)
        assert str(error.value).startswith(f"{kept} names the shard {pipe}")
    with pytest.raises(DataError, match=REFUSED):
        repack(kept, tmp_path / "out", 10, lambda _: None)
    assert not (tmp_path / "ran").exists()


def test_the_same_command_typed_beside_it_may_run(selection, tmp_path):
    kept, pipe = selection
    assert [each.url for each in listed([str(kept), pipe])] == [str(tmp_path / "00000.tar"), pipe, pipe]
    assert repack(kept, tmp_path / "out", 10, lambda _: None, pipes=[pipe]).packed == 2
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("verb", ["filter", "dedup"])
def test_jobs_that_read_a_selection_run_no_command(verb, selection, tmp_path):
    if verb == "dedup":
        pytest.importorskip("imagehash"), pytest.importorskip("faiss")
    kept, _ = selection
    rule = ["--where", "TRUE"] if verb == "filter" else []
    with pytest.raises(DataError, match=REFUSED):
        importlib.import_module(f"t2i_cli.data.{verb}").run([str(kept), str(tmp_path / "new.arrow"), *rule])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "shards",
    [
        "shards: '{pipe}'",
        "shards: ['a.tar', '{pipe}']",
        "shards: 'a.tar::{pipe}'",
        "shards: 'a.tar'\n  heldout_shards: '{pipe}'",
        "shards: null\n  mixture: {{a: {{shards: '{pipe}'}}}}",
    ],
)
def test_a_file_of_configuration_runs_no_command(shards, tmp_path, monkeypatch):
    pipe = f"pipe:touch {tmp_path}/ran"
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    text = f"# @package _global_\ndata:\n  source: null\n  {shards.format(pipe=pipe)}\n"
    (folder / "experiment" / "theirs.yaml").write_text(text)
    arguments = ["stage=autoencoder", "data=shards", "experiment=theirs"]
    with pytest.raises(ConfigError, match="commands that the command line names"):
        composed_run(arguments, str(folder))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="commands that the command line names"):
        train.run([*arguments, "--config-dir", str(folder)])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "typed",
    [
        "data.shards=pipe:cat 'a b.tar'",
        "data.shards=[pipe:cat a.tar,b.tar]",
        "data.shards=pipe:cat a{0..3}.tar",
        "data.shards='pipe:cat a.tar, b.tar'",
        "+data.mixture.a={shards: 'pipe:cat a.tar'}",
    ],
)
def test_what_is_typed_composes(typed):
    values = composed_run(["stage=autoencoder", "data=shards", typed])
    assert "pipe:cat" in str(values["data"])
