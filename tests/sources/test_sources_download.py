"""Downloads from a server on this machine, with all that goes wrong on the web; shards are read by webdataset, their
tables by pyarrow, and a shard that img2dataset itself wrote says what they must look like."""

from __future__ import annotations

import hashlib
import io
import json
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_server import CountingServer, Server, downloaded, encoded, files, read, rows, table_of
from PIL import Image

from t2i.data.index import ShardIndex
from t2i.errors import ConfigError, DataError
from t2i_pipelines.downloading.download import DownloadOptions
from t2i_pipelines.downloading.fetch import USER_AGENT, FetchLimits, forbids, retry_after_s
from t2i_pipelines.shard_writer import LAYOUT
from t2i_pipelines.tables import open_table

GOLDEN = Path(__file__).parent / "data" / "img2dataset"


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def test_pictures_with_their_bytes_captions_and_columns(server, tmp_path):
    paths = ["ok/1", "png/2", "webp/3", "moved/here", "gif/4"]
    captions = ["ein Bild, größer 🎈", "b", None, "d", "e"]
    table = table_of(
        server, tmp_path, paths, caption=captions, punsafe=[0.5, float("nan"), 1.0, None, 0.0], n=range(5)
    )
    report = downloaded(table, tmp_path / "out", samples_per_shard=3)
    assert (report.shards, report.skipped, report.statuses) == (2, 0, {"success": 5})
    assert report.fetched_bytes == sum(
        len(each)
        for each in (
            encoded(seed=1),
            encoded("PNG", seed=2),
            encoded("WEBP", seed=3),
            encoded(seed=1),
            encoded("GIF", seed=4),
        )
    )
    found = read(tmp_path / "out")
    assert [sample["__key__"] for sample in found] == [
        "000000000",
        "000000001",
        "000000002",
        "000010000",
        "000010001",
    ]
    assert [sample["txt"].decode() for sample in found] == ["ein Bild, größer 🎈", "b", "", "d", "e"]
    assert found[0]["jpg"] == found[3]["jpg"] == encoded(seed=1)  # not encoded again
    assert (found[1]["png"], found[2]["webp"]) == (encoded("PNG", seed=2), encoded("WEBP", seed=3))
    gif = Image.open(io.BytesIO(encoded("GIF", seed=4))).convert("RGB")
    assert Image.open(io.BytesIO(found[4]["png"])).tobytes() == gif.tobytes()
    assert json.loads(found[1]["json"]) == {
        "caption": "b",
        "url": server.url("png/2"),
        "key": "000000001",
        "status": "success",
        "error_message": None,
        "width": 24,
        "height": 16,
        "original_width": 24,
        "original_height": 16,
        "exif": "{}",
        "sha256": hashlib.sha256(encoded("PNG", seed=2)).hexdigest(),
        "punsafe": None,
        "n": 1,
    }
    for sample, row in zip(found, rows(tmp_path / "out"), strict=True):
        expected = json.loads(sample["json"])
        row["punsafe"] = None if row["punsafe"] != row["punsafe"] else row["punsafe"]
        assert row == expected
    assert server.agents == {USER_AGENT}


FAILURES = {
    "status/404": ("failed_to_download", "http_404"),
    "status/403": ("failed_to_download", "http_403"),
    "status/503": ("failed_to_download", "http_503"),
    "busy/": ("failed_to_download", "http_429"),
    "loop/0": ("failed_to_download", "redirects"),
    "moved/ftp://127.0.0.1/x.jpg": ("failed_to_download", "url"),
    "moved/file:///etc/hostname": ("failed_to_download", "url"),
    "endless/": ("failed_to_download", "too_large"),
    "large/": ("failed_to_download", "too_large"),
    "zipped/": ("failed_to_download", "too_large"),
    "cut/": ("failed_to_download", "connection"),
    "robots/noai": ("failed_to_download", "robots"),
    "html/": ("failed_to_resize", "image"),
    "half/": ("failed_to_resize", "image"),
    "ftp://127.0.0.1/x.jpg": ("failed_to_download", "url"),
    "file:///etc/hostname": ("failed_to_download", "url"),
    "http://[::1/x.jpg": ("failed_to_download", "url"),
    "http://127.0.0.1:1/x.jpg": ("failed_to_download", "connection"),
    None: ("failed_to_download", "url"),
}


def test_what_fails_is_in_the_table_with_its_cause(server, tmp_path):
    paths = [*FAILURES, "ok/7"]
    report = downloaded(table_of(server, tmp_path, paths, tag=["x"] * len(paths)), tmp_path / "out")
    found = rows(tmp_path / "out")
    causes = [(row["status"], (row["error_message"] or "").partition(":")[0]) for row in found]
    assert dict(zip(paths, causes, strict=True)) == {**FAILURES, "ok/7": ("success", "")}
    (sample,) = read(tmp_path / "out")
    assert sample["__key__"] == found[-1]["key"] == f"00000{len(FAILURES):04d}"  # its place among all rows
    assert {(row["tag"], row["width"], row["sha256"]) for row in found[:-1]} == {("x", None, None)}
    expected = Counter(cause for _, cause in FAILURES.values()) + Counter(success=1)
    assert report.statuses == expected
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert stats["status_dict"] == expected
    counts = {name: stats[name] for name in ("count", "successes", "failed_to_download", "failed_to_resize")}
    assert counts == {
        "count": len(paths), "successes": 1, "failed_to_download": len(FAILURES) - 2, "failed_to_resize": 2
    }  # fmt: skip
    # Once more after what may pass, and after nothing else.
    assert {path: server.calls[path] for path in ("status/404", "status/503", "busy/", "cut/", "robots/noai")} == {
        "status/404": 1, "status/503": 2, "busy/": 1, "cut/": 2, "robots/noai": 1
    }  # fmt: skip


def test_space_around_a_url_is_no_part_of_it(server, tmp_path):
    url, broken = server.url("ok/1"), server.url("zipped/badly")
    urls = [f" {url}", f"{url}\n", f"\t{url} ", broken, " "]
    pq.write_table(pa.table({"url": urls, "caption": list("abcde")}), tmp_path / "table.parquet")
    report = downloaded(tmp_path / "table.parquet", tmp_path / "out")
    assert report.statuses == {"success": 3, "connection": 1, "url": 1}
    assert "\n" not in rows(tmp_path / "out")[3]["error_message"]


def test_what_passes_is_tried_again(server, tmp_path):
    paths = ["later/500", "later/503", "later/429"]
    report = downloaded(table_of(server, tmp_path, paths), tmp_path / "out", retries=1)
    assert report.statuses == {"success": 3}
    assert set(server.calls.values()) == {2}


def test_a_server_that_hangs_costs_no_more_than_the_deadline(server, tmp_path):
    start = time.monotonic()
    table = table_of(server, tmp_path, ["hang/1", "ok/1", "hang/2", "later/500"])
    report = downloaded(table, tmp_path / "out", timeout_s=1.5, retries=5)
    assert time.monotonic() - start < 4
    assert report.statuses == {"timeout": 2, "success": 2}
    assert rows(tmp_path / "out")[0]["error_message"] == "timeout: no answer within 1.5 s"


def test_no_more_than_so_many_connections(tmp_path):
    server = CountingServer()
    downloaded(table_of(server, tmp_path, [f"ok/{i}" for i in range(60)]), tmp_path / "out", connections=5)
    server.stop()
    assert server.busiest == 5


@pytest.mark.parametrize(
    ("headers", "forbidden"),
    [
        ([], False),
        (["all"], False),
        (["noai"], True),
        (["NoImageAI , nofollow"], True),
        (["nofollow, noindex"], True),
        (["nofollow", "noimageindex"], True),
        (["otherbot: noindex, noai"], False),
        (["t2i: noai"], True),
        (["T2I: nofollow, noindex"], True),
        (["*: noai"], True),
        (["otherbot: nofollow, t2i: noindex"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noindex"], True),
        (["max-snippet: 20"], False),
        (["noindexing"], False),
    ],
)
def test_robots(headers, forbidden):
    assert forbids(headers) is forbidden


def test_retry_after():
    assert retry_after_s("7") == 7
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert retry_after_s("soon") is None
    assert retry_after_s(None) is None
    ahead = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 95 < (retry_after_s(ahead) or 0) <= 100


def test_columns_named_as_the_layout_s_own_are_kept_under_another_name(server, tmp_path):
    table = table_of(server, tmp_path, ["ok/1"], WIDTH=[1000], key=["mine"])
    downloaded(table, tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert (row["width"], row["table_WIDTH"], row["key"], row["table_key"]) == (24, 1000, "000000000", "mine")
    assert json.loads(read(tmp_path / "out")[0]["json"]) == row


def test_img2dataset_s_own_shard_is_read_and_ours_is_the_same(server, tmp_path):
    """data/img2dataset was written by img2dataset 1.47.0 (keep_ratio, 32 px, additional columns similarity and
    punsafe) from two pictures as here, an address that answers 404 and one that answers a page."""
    index = ShardIndex.scan(GOLDEN / "00000.tar").with_sizes(GOLDEN / "00000.tar")
    assert (index.keys, index.flaws) == (["000000002", "000000000"], {})
    assert index.original_px is not None
    assert index.original_px.tolist() == [[48, 20], [30, 40]]
    with (GOLDEN / "00000.tar").open("rb") as file:
        theirs = index.read(file.fileno(), 1)
    assert theirs["txt"].decode() == "ein Bild, größer"
    assert Image.open(io.BytesIO(theirs["jpg"])).size == (40, 30)

    table = table_of(
        server,
        tmp_path,
        ["ok/1", "status/404", "ok/2", "html/"],
        similarity=[0.25, 0.5, 0.75, 1.0],
        punsafe=[1, 2, 3, 4],
        caption=["ein Bild, größer", "gone", "second", None],
    )
    out = tmp_path / "out"
    downloaded(table, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in GOLDEN.iterdir()}
    ours = ShardIndex.scan(out / "00000.tar")
    assert (sorted(ours.keys), ours.extensions) == (sorted(index.keys), index.extensions)
    with (out / "00000.tar").open("rb") as file:
        member = ours.read(file.fileno(), 0)
    assert {k: type(v) for k, v in json.loads(member["json"]).items()} == {
        k: type(v) for k, v in json.loads(theirs["json"]).items()
    }
    read_theirs, read_ours = (pq.read_table(folder / "00000.parquet") for folder in (GOLDEN, out))
    assert read_ours.schema.equals(read_theirs.schema)  # names, order and types
    same = ["similarity", "punsafe", "caption", "key", "status"]
    by_key = read_theirs.sort_by("key")
    assert read_ours.select(same).equals(by_key.select(same))
    for name in read_ours.column_names:  # null in the same rows
        assert read_ours[name].is_null().equals(by_key[name].is_null()), name
    stats = [json.loads((folder / "00000_stats.json").read_text()) for folder in (GOLDEN, out)]
    assert stats[1].keys() - stats[0].keys() == {"rows"}
    assert stats[0].keys() <= stats[1].keys()
    for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
        assert stats[0][name] == stats[1][name]


def test_a_column_of_bytes_is_left_out(server, tmp_path):
    table = table_of(server, tmp_path, ["ok/1"], image=[{"bytes": b"abc", "path": None}], n=[1])
    assert open_table(str(table), tmp_path).left_out == ("image",)
    downloaded(table, tmp_path / "out")
    assert rows(tmp_path / "out")[0].keys() == {"n", *LAYOUT}


def test_options_that_are_not_allowed():
    for options, words in (
        ({"connections": 0}, "connections is 0; allowed: 1 or more"),
        ({"image_size_px": 0}, "image_size_px is 0; allowed: 1 or more"),
        ({"limits": FetchLimits(timeout_s=0)}, "timeout_s is 0"),
        ({"limits": FetchLimits(retries=-1)}, "retries is -1; allowed: 0 or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            DownloadOptions(**options)
    with pytest.raises(DataError, match="samples_per_shard is 10001; allowed: 1 to 10000"):
        DownloadOptions(samples_per_shard=10_001)


def test_where_nothing_can_be_written(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t2i_pipelines.downloading.open_shard.write_shard", full)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device"):
        downloaded(table_of(server, tmp_path, ["ok/1", "ok/2"]), tmp_path / "out", samples_per_shard=1)
    assert not files(tmp_path / "out")


def test_memory_does_not_grow_with_the_table(server, tmp_path):
    """8,000 rows with captions of 2 kB, and 400 pictures of 100 kB: 16 and 40 MB."""
    caption = "x" * 2000
    captions = [f"{i} {caption}" for i in range(8_000)]
    table = table_of(server, tmp_path, ["ftp://127.0.0.1/"] * 8_000, caption=captions)
    assert peak(table, tmp_path / "rows") < 8 << 20
    (tmp_path / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=98)
    assert len(buffer.getvalue()) > 100_000
    server.pictures["noise"] = buffer.getvalue()
    table = table_of(server, tmp_path, [f"noise/{i}" for i in range(400)])
    assert peak(table, tmp_path / "pictures") < 20 << 20


def peak(table: Path, out: Path) -> int:
    """Bytes at most while it is downloaded."""
    tracemalloc.start()
    downloaded(table, out, samples_per_shard=100, connections=8)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most
