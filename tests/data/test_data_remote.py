"""Whole loaders over shards on a web server and in an object store, both on this machine."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_configs import data_config
from data_samples import good_members
from servers import web_server

from t2i.data.loader import build_loader
from t2i.data.store import cache_folder
from t2i.errors import DataError
from t2i.interfaces import Batch
from t2i_pipelines import indexing

SIZES = (5, 6, 4, 6, 5)
TOTAL = sum(SIZES)


@pytest.fixture(autouse=True)
def here_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda s, sleep=time.sleep: sleep(min(s, 0.1)))


@pytest.fixture
def folder(write_tar, tmp_path) -> Path:
    """Shards 00000 to 00004 with the keys 000000000 ..."""
    (tmp_path / "shards").mkdir()
    for number, size in enumerate(SIZES):
        samples = {f"{number:05d}{i:04d}": good_members(10 * number + i) for i in range(size)}
        write_tar(f"shards/{number:05d}.tar", samples)
    return tmp_path / "shards"


def write_index(folder: Path, of: int = len(SIZES)) -> None:
    entries = {}
    for path in sorted(folder.glob("*.tar"))[:of]:
        entries[path.name] = indexing._index_one(str(path), path.with_suffix(".index.npz")).entry
    (folder / "index.json").write_text(json.dumps({"version": 1, "shards": entries}))


def shards(base: str | Path) -> str:
    return f"{base}/{{00000..00004}}.tar"


def epochs(url: str, batches: int, **options) -> list[Batch]:
    loading = {"size_px": (8, 10), "batch_size": 4, "text_dropout": 0.2, "min_original_px": 0, "seed": 2}
    for name in ("batch_size", "rank", "world_size", "min_original_px", "size_px"):
        if name in options:
            loading[name] = options.pop(name)
    data = data_config(shards=url, **{"shuffle_window_shards": 2, "crop": "random"} | options)
    images = batches * loading["batch_size"] * loading.get("world_size", 1)
    return list(build_loader(data, num_images=images, **loading))


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.key, a.caption, a.metadata, a.bad) == (b.key, b.caption, b.metadata, b.bad)
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.crop, b.crop)


def fetched(asked: list[str]) -> Counter:
    return Counter(
        path.removeprefix("GET /") for path in asked if path.startswith("GET") and path.endswith(".tar")
    )


def bad(batches: list[Batch]) -> Counter:
    return sum((Counter(batch.bad) for batch in batches), Counter())


@pytest.mark.parametrize("beside", ["nothing", "index", "some", "stats"])
@pytest.mark.parametrize("workers", [0, 2])
def test_over_http_batches_are_those_of_local_shards_and_each_shard_is_fetched_once(folder, beside, workers):
    wanted = epochs(shards(folder), 13)
    if beside in ("index", "some"):
        write_index(folder, of=3 if beside == "some" else len(SIZES))
    if beside == "stats":
        for number, size in enumerate(SIZES):
            (folder / f"{number:05d}_stats.json").write_text(json.dumps({"successes": size}))
    with web_server(folder) as (url, handler):
        found = epochs(shards(url), 13, num_workers=workers)
        assert_same(found, wanted)
        assert fetched(handler.asked) == {f"{number:05d}.tar": 1 for number in range(len(SIZES))}


def test_two_ranks_of_a_node_share_what_is_fetched(folder):
    wanted = epochs(shards(folder), 7)
    with web_server(folder) as (url, handler):
        ranks = [
            epochs(shards(url), 7, batch_size=2, num_workers=1, rank=rank, world_size=2) for rank in range(2)
        ]
        for batch, *parts in zip(wanted, *ranks, strict=True):
            assert [batch.key[rank::2] for rank in range(2)] == [part.key for part in parts]
        assert fetched(handler.asked) == {f"{number:05d}.tar": 1 for number in range(len(SIZES))}


def test_buckets_and_sizes_of_remote_shards_come_from_their_indexes(folder):
    options = {"bucket_step_px": 4, "size_px": 8, "min_original_px": 100}
    wanted = epochs(shards(folder), 8, **options)
    write_index(folder)
    with web_server(folder) as (url, handler):
        assert_same(epochs(shards(url), 8, num_workers=2, **options), wanted)
        assert max(fetched(handler.asked).values()) == 1


@pytest.mark.parametrize("trouble", ["drop_once", "503_twice", "no_ranges"])
@pytest.mark.parametrize("workers", [0, 2])
def test_troubles_that_pass_lose_nothing(folder, trouble, workers):
    wanted = epochs(shards(folder), 7)
    write_index(folder)
    with web_server(folder) as (url, handler):
        handler.trouble.update({"00001.tar": trouble, "00003.tar": trouble, "00002.index.npz": trouble})
        assert_same(epochs(shards(url), 7, num_workers=workers), wanted)


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [("404", "missing"), ("403", "unreadable"), ("drop", "unreadable"), ("hang", "unreadable")],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_cannot_be_had_is_counted_sample_by_sample_in_bounded_time(
    folder, trouble, cause, workers
):
    write_index(folder)
    with web_server(folder) as (url, handler):
        handler.trouble["00001.tar"] = trouble
        began = time.monotonic()
        found = epochs(
            shards(url), TOTAL, batch_size=1, num_workers=workers, max_bad_share=1.0, deadline_s=0.4
        )  # one epoch
        assert time.monotonic() - began < 25
    assert bad(found) == {cause: SIZES[1]}
    keys = {key for batch in found for key in batch.key}
    assert keys == {f"{s:05d}{i:04d}" for s, size in enumerate(SIZES) if s != 1 for i in range(size)}


@pytest.mark.parametrize("trouble", ["404", "hang"])
def test_a_shard_that_cannot_be_had_at_the_start_counts_once(folder, trouble):
    """Its size is not known."""
    with web_server(folder) as (url, handler):
        handler.trouble["00001"] = trouble
        with pytest.raises(DataError, match=r"data\.shards names http.*00001\.tar, which"):
            epochs(shards(url), 1, deadline_s=0.2)
        positions = TOTAL - SIZES[1] + 1
        found = epochs(shards(url), positions, batch_size=1, max_bad_share=0.5, deadline_s=0.2)
    assert bad(found) == {"missing" if trouble == "404" else "unreadable": 1}


def test_a_server_that_hangs_altogether_ends_in_a_sentence(folder):
    write_index(folder)
    with web_server(folder) as (url, handler):
        loader_begins = time.monotonic()
        handler.trouble.update({f"0000{n}.tar": "hang" for n in range(5)})
        with pytest.raises(DataError, match="cannot be replaced"):
            epochs(shards(url), 1, max_bad_share=1.0, deadline_s=0.2)
        assert time.monotonic() - loader_begins < 25


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_too_small_for_two_shards_still_gives_every_sample(folder, workers):
    wanted = epochs(shards(folder), 26, shuffle_window_shards=4)
    write_index(folder)
    with web_server(folder) as (url, _):
        found = epochs(
            shards(url), 26, num_workers=workers, shuffle_window_shards=4, shard_cache_gib=40_000 / 2**30
        )
        assert_same(found, wanted)
    copies = [path.stat().st_size for path in cache_folder().glob("*.tar")]
    assert sum(copies) <= 40_000
    assert not list(cache_folder().glob("*.part"))


def test_signed_addresses_find_what_lies_beside_a_shard(folder):
    wanted = epochs(shards(folder), 7)
    write_index(folder)
    with web_server(folder) as (url, handler):
        found = epochs([f"{url}/{n:05d}.tar?sig=a/b%3D" for n in range(5)], 7)
        assert [batch.key for batch in found] == [batch.key for batch in wanted]
        assert set(fetched(handler.asked).values()) == {1}
        assert "GET /00003.index.npz" in handler.asked


@pytest.fixture(scope="module")
def object_store():
    """The address of a server that speaks S3."""
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(object_store, monkeypatch):
    """upload(folder) -> s3 URL of a new bucket that holds its files."""
    import fsspec

    fake = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (fake | {"AWS_ENDPOINT_URL": object_store}).items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    names = (f"b{os.getpid()}-{number}" for number in range(100))

    def upload(folder: Path) -> str:
        name = next(names)
        if fs.exists(name):
            fs.rm(name, recursive=True)
        fs.mkdir(name)
        for path in folder.iterdir():
            fs.put_file(str(path), f"{name}/train/{path.name}")
        return f"s3://{name}/train"

    yield upload
    type(fs).clear_instance_cache()


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_in_an_object_store_batches_are_those_of_local_shards(folder, bucket, with_index, workers):
    wanted = epochs(shards(folder), 13)
    if with_index:
        write_index(folder)
    assert_same(epochs(shards(bucket(folder)), 13, num_workers=workers), wanted)


def test_what_is_not_in_an_object_store_is_said_and_counted(folder, bucket):
    write_index(folder)
    (folder / "00001.tar").unlink()
    url = bucket(folder)
    found = epochs(shards(url), TOTAL, batch_size=1, max_bad_share=1.0)
    assert bad(found) == {"missing": SIZES[1]}
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"names s3://.*none\.tar, which does not exist"):
        epochs(f"{url}/none.tar", 1)
