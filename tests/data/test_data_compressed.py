"""Shards that are compressed as a whole."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_configs import data_config
from data_samples import good_members
from fuzz_shards import (
    PER_SHARD,
    TOTAL,
    WHOLE,
    count_bad,
    delivered,
    epoch_or_refusal,
    fuzzing,
    lay_out,
    overwrite,
)
from hypothesis import given
from hypothesis import strategies as st
from open_shards import everything, opened, take
from servers import web_server

from t2i.data import sources
from t2i.data.encoded import shard_name
from t2i.data.index import SUFFIX, ShardIndex
from t2i.data.sources import Limits
from t2i.data.store import ShardStore, cache_folder
from t2i.errors import DataError
from t2i_pipelines import indexing
from t2i_pipelines.inspecting.inspection import inspect_shards
from t2i_pipelines.shard_metadata import local_copy, metadata_of

PACKERS = {"tar.gz": gzip.compress, "tgz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def packed(path: Path, ending: str, packer=None) -> Path:
    """The shard compressed, an hour ago, in its own place."""
    made = path.with_name(f"{path.stem}.{ending}")
    made.write_bytes((packer or PACKERS[ending])(path.read_bytes()))
    hour = time.time() - 3600
    os.utime(made, (hour, hour))
    path.unlink()
    return made


@pytest.mark.parametrize("ending", sorted(PACKERS))
def test_every_kind_is_read_as_the_plain_shard_is_and_as_webdataset_does(shard, ending):
    plain = take(data_config(shards=str(shard(0, 6))), 4, batch_size=3)
    path = packed(shard(0, 6), ending)
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert everything(opened([path])) == (theirs, {})
    batches = take(data_config(shards=str(path)), 4, batch_size=3)
    assert [batch.key for batch in batches] == [batch.key for batch in plain]
    assert all((a.image == b.image).all() for a, b in zip(batches, plain, strict=True))


def test_the_content_decides_not_the_name(shard):
    path = packed(shard(0, 6), "tar.gz")
    renamed = path.rename(path.with_name("00000.tar"))
    assert len(everything(opened([renamed]))[0]) == 6
    plain = shard(1, 3)
    renamed = plain.rename(plain.with_name("00001.tar.gz"))
    assert everything(opened([renamed]))[0] == ["000010000", "000010001", "000010002"]


def test_it_is_unpacked_once_for_all_starts_and_again_when_it_changes(shard, caplog):
    caplog.set_level("INFO")
    path = packed(shard(0, 4), "tar.gz")
    assert opened([path]).sizes.tolist() == [4]
    assert sum("unpacked" in message for message in caplog.messages) == 1
    (copy,) = cache_folder().glob("*.tar")
    written = copy.stat().st_mtime_ns
    assert len(everything(opened([path]))[0]) == 4
    assert copy.stat().st_mtime_ns == written
    packed(shard(0, 5), "tar.gz")
    assert len(everything(opened([path]))[0]) == 5


def test_of_a_server_and_of_a_pipe(shard, tmp_path):
    path = packed(shard(0, 4), "tar.gz")
    with web_server(tmp_path) as (url, handler):
        shards = opened([f"{url}/{path.name}?token=a"])
        assert len(everything(shards)[0]) == 4
        assert handler.asked.count(f"GET /{path.name}") == 1
    store = ShardStore(Limits(), allow_pipes=True)
    with store.open_tar(f"pipe:cat {path}") as file:
        assert len(ShardIndex.scan("p", file.fileno())) == 4


def test_what_lies_beside_it_has_the_name_of_the_plain_shard(shard, tmp_path):
    for name in ("a/00000.tar", "a/00000.tar.gz", "a/00000.tgz", "a/00000.tar.bz2", "a/00000.tar.xz"):
        assert sources.beside(name, "_stats.json") == "a/00000_stats.json"
        assert sources.beside(f"https://host/{name}?t=1", SUFFIX) == f"https://host/a/00000{SUFFIX}?t=1"
        assert shard_name(name) == "a/00000.tar"
        assert sources.stem(f"a#1/what?/{name}") == sources.stem(f"https://host/{name}?t=a/b.tar") == "00000"
    assert sources.stem("a #1?.tar") == "a #1?"
    path = packed(shard(0, 4), "tar.gz")
    (tmp_path / "00000_stats.json").write_text(json.dumps({"successes": 5}))
    assert everything(opened([path]))[1] == {"missing": 1}


def test_it_can_be_indexed(shard, tmp_path, monkeypatch):
    path = packed(shard(0, 4), "tar.gz")
    indexing.index_shards([str(path)], None, 1, lambda _: None)
    assert (tmp_path / f"00000{SUFFIX}").exists()
    monkeypatch.setattr(ShardIndex, "scan", None)
    shards = opened([path])
    assert shards.sizes.tolist() == [4]
    keys, bad = everything(shards)
    assert (keys, bad) == ([f"00000{i:04d}" for i in range(4)], {})


def test_jobs_read_it(shard):
    path = packed(shard(0, 4), "tar.gz")
    with local_copy(str(path)) as plain:
        assert len(ShardIndex.scan(plain)) == 4
    assert not plain.exists()
    table, _ = metadata_of(str(path))
    assert table["key"].to_pylist() == [f"00000{i:04d}" for i in range(4)]
    report = inspect_shards([str(path)], False, 2, 16, 0, 1, lambda _: None)
    assert (report.facts.samples, report.facts.pictures, report.unreadable) == (4, 4, {})
    assert all(tile.picture is not None for tile in report.tiles)


def test_one_that_unpacks_to_more_than_the_cache_may_hold_is_named(tmp_path):
    path = tmp_path / "00000.tar.gz"
    path.write_bytes(gzip.compress(bytes(20 << 20)))
    with pytest.raises(
        DataError, match=r"00000\.tar\.gz unpacks to more than .* data\.shard_cache_gib allows"
    ):
        ShardStore(Limits(), max_gib=10 / 1024).open_tar(str(path))
    assert list(cache_folder().glob("*.tar*")) == list(cache_folder().glob("*.lock"))


@pytest.mark.parametrize(("begin", "kind"), [(b"\x28\xb5\x2f\xfd", "zstandard"), (b"PK\x03\x04", "zip")])
def test_what_is_packed_in_another_way_is_named(begin, kind, tmp_path):
    (tmp_path / "00000.tar").write_bytes(begin + bytes(3000))
    with pytest.raises(DataError, match=f"is a {kind} file; allowed: tar, alone or compressed by gzip"):
        opened([tmp_path / "00000.tar"])


def test_a_stream_that_is_cut_short_gives_what_came_before_and_counts_the_rest(shard, tmp_path):
    rng = np.random.default_rng(0)
    path = shard(0, 1)
    path.write_bytes(b"")
    samples = {f"{i}": good_members(i) | {"bin": rng.bytes(5000)} for i in range(40)}
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    path = packed(path, "tar.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    keys, bad = everything(opened([path]))
    assert 15 <= len(keys) <= 20
    assert bad["truncated"] == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz"])
@fuzzing
@given(at=st.integers(0, 3000), by=st.binary(min_size=1, max_size=40), cut=st.booleans())
def test_whatever_the_bytes_every_loss_is_counted(folder, ending, at, by, cut):
    """Of a compressed stream a checksum does say when bytes have changed, but only at its end."""
    data = lay_out(folder, WHOLE[1], "stats")
    content = PACKERS[ending](WHOLE[1])
    at %= len(content)
    (folder / "00001.tar").write_bytes(content[:at] if cut else overwrite(content, at, by))
    batches = epoch_or_refusal(data)
    lost = set(range(TOTAL)) - delivered(batches)
    assert lost <= set(range(PER_SHARD, 2 * PER_SHARD))
    keys = {batch.key[0] for batch in batches}
    gone = {number for number in lost if f"{number // PER_SHARD:05d}{number % PER_SHARD:04d}" not in keys}
    assert len(gone) <= count_bad(batches)
