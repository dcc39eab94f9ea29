"""Downloads from a server on this machine, with all that goes wrong on the web; shards are read by webdataset, their
tables by pyarrow, and a shard that img2dataset itself wrote says what they must look like."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from t2i.data.decode import BadSample
from t2i.data.index import ShardIndex
from t2i.errors import ConfigError, DataError
from t2i_pipelines.download import DownloadOptions, Report, download
from t2i_pipelines.fetch import USER_AGENT, FetchLimits, forbids, retry_after_s
from t2i_pipelines.pictures import prepare
from t2i_pipelines.shard_writer import LAYOUT
from t2i_pipelines.tables import open_table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
web = pytest.importorskip("aiohttp.web")

GOLDEN = Path(__file__).parent / "data" / "img2dataset"


def encoded(kind: str = "JPEG", size: tuple[int, int] = (24, 16), seed: int = 0, **options) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize(size).save(buffer, kind, **options)
    return buffer.getvalue()


class Server:
    """What a URL's path says is what happens; `calls` counts the requests, `released` lets /wait/ go on."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.pictures: dict[str, bytes] = {}
        self.released = threading.Event()
        self.loop = asyncio.new_event_loop()
        self.started = threading.Event()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        self.started.wait()

    def serve(self) -> None:
        app = web.Application()
        app.router.add_get("/{what}/{rest:.*}", self.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self.started.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())

    def stop(self) -> None:
        self.released.set()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    async def answer(self, request):
        self.calls[request.path.lstrip("/")] += 1
        self.agents.add(request.headers["User-Agent"])
        what, rest = request.match_info["what"], request.match_info["rest"]
        count = self.calls[request.path.lstrip("/")]
        if what == "status":
            return web.Response(status=int(rest))
        if what == "later" and count == 1:  # /later/503 fails once
            return web.Response(status=int(rest), headers={"Retry-After": "0"})
        if what == "busy":
            return web.Response(status=429, headers={"Retry-After": "3600"})
        if what == "loop":
            raise web.HTTPFound(f"/loop/{int(rest) + 1}")
        if what == "moved":
            raise web.HTTPFound("/ok/1" if rest == "here" else rest)
        if what == "hang":
            await asyncio.sleep(60)
        if what == "wait":
            while not self.released.is_set():
                await asyncio.sleep(0.01)
        if what == "endless":
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(bytes(1 << 16))
        if what == "zipped":
            headers = {"Content-Encoding": "gzip"}
            return web.Response(body=gzip.compress(bytes(50 << 20)), headers=headers)
        if what == "cut":
            response = web.StreamResponse(headers={"Content-Length": "10000"})
            await response.prepare(request)
            await response.write(encoded()[:200])
            request.transport.close()
            return response
        if what == "half":
            return web.Response(body=encoded(size=(256, 256))[:-400])
        if what == "robots":
            return web.Response(body=encoded(), headers={"X-Robots-Tag": rest})
        if what == "html":
            return web.Response(text="<html>gone</html>", content_type="text/html")
        if what == "large":
            return web.Response(body=bytes(3 << 20))
        if what in self.pictures:
            return web.Response(body=self.pictures[what])
        kind = {"png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}.get(what, "JPEG")
        return web.Response(body=encoded(kind, seed=int(rest or 0)))


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def table_of(server: Server, folder: Path, paths: list[str | None], **columns: list) -> Path:
    urls = [path if path is None or re.match(r"\w+:", path) else server.url(path) for path in paths]
    captions = columns.pop("caption", [f"picture {i}" for i in range(len(paths))])
    path = folder / "table.parquet"
    pq.write_table(pa.table({"url": urls, "caption": pa.array(captions, pa.string()), **columns}), path)
    return path


def downloaded(table: Path, out: Path, report: Report | None = None, **options) -> Report:
    limits = FetchLimits(
        options.pop("timeout_s", 5.0), options.pop("max_mib", 2.0), options.pop("retries", 1)
    )
    chosen = DownloadOptions(**{"decoders": 0, "limits": limits, **options})
    opened = open_table(str(table), out / ".table")
    return download(opened, out, chosen, "url", "caption", lambda done: None, report)


def read(folder: Path) -> list[dict]:
    return list(wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


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


def test_reduced_to_the_shorter_side_and_never_enlarged(tmp_path):
    picture = prepare(encoded(size=(300, 200)), "k", 64)
    image = Image.open(io.BytesIO(picture.image or b""))
    assert (image.format, image.size) == ("JPEG", (96, 64))
    assert (picture.width, picture.height, picture.original_width, picture.original_height) == (
        96,
        64,
        300,
        200,
    )
    reference = Image.open(io.BytesIO(encoded(size=(300, 200)))).resize((96, 64), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(reference, dtype=int))
    assert difference.mean() < 2
    assert picture.sha256 == hashlib.sha256(encoded(size=(300, 200))).hexdigest()  # of what was downloaded
    for size in ((300, 64), (10, 20)):
        small = prepare(encoded("PNG", size), "k", 64)
        assert (small.image, small.extension, small.width, small.height) == (None, "png", *size)


def test_exif_is_told_and_turns_the_picture():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769)[0x829A] = 0.5
    data = encoded(size=(32, 16), exif=exif)
    picture = prepare(data, "k")
    assert (picture.image, picture.width, picture.height) == (None, 16, 32)
    told = json.loads(picture.exif or "")
    assert (told["Image Make"], told["Image Orientation"], told["EXIF ExposureTime"]) == ("Maker", "6", "0.5")
    turned = Image.open(io.BytesIO(prepare(data, "k", 8).image or b""))
    assert turned.size == (8, 16)
    assert turned.getexif().get(0x0112) is None


def test_pictures_that_are_refused():
    bomb = encoded("PNG", (8, 8))
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bomb[24:29]
    large = bomb[:12] + header + zlib.crc32(header).to_bytes(4, "big") + bomb[33:]
    with pytest.raises(BadSample, match="bomb"):
        prepare(large, "k")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(BadSample, match="not a picture in a known format"):  # Pillow would start Ghostscript
        prepare(postscript, "k")


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


def files(folder: Path) -> dict[str, bytes]:
    """Of each shard, without the times in its statistics."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    for name in found:
        if name.endswith(".json"):
            stats = json.loads(found[name])
            for key in ("duration", "start_time", "end_time"):
                del stats[key]
            found[name] = json.dumps(stats).encode()
    return found


def test_after_a_kill_it_goes_on_to_the_same_bytes(server, tmp_path):
    paths = [*(f"ok/{i}" for i in range(12)), "status/404", *(f"wait/{i}" for i in range(13, 20))]
    table, out = table_of(server, tmp_path, paths, n=range(20)), tmp_path / "out"
    command = [sys.executable, "-m", "t2i_cli.main", "data", "download", str(table), str(out)]
    options = ["--samples-per-shard", "5", "--timeout-s", "60", "--connections", "8"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "00001.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = child_processes(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in out.glob("[!.]*")) == [
        f"0000{i}{end}" for i in (0, 1) for end in (".parquet", ".tar", "_stats.json")
    ]
    assert len(read(out)) == 10
    server.released.set()
    server.calls.clear()
    report = downloaded(table, out, samples_per_shard=5)
    assert (report.shards, report.skipped, report.statuses) == (4, 2, {"success": 19, "http_404": 1})
    assert server.calls.keys() == set(paths[10:])  # nothing again
    downloaded(table, tmp_path / "whole", samples_per_shard=5)
    assert files(out) == files(tmp_path / "whole")
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children
    assert not any(map(alive, children))  # those that decode end with their parent


def child_processes(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_leaves_complete_shards_and_says_how_to_go_on(server, tmp_path):
    table = table_of(server, tmp_path, [*(f"ok/{i}" for i in range(4)), "wait/5"])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "t2i_cli.main", "data", "download", str(table), str(out)]
    process = subprocess.Popen(
        [*command, "--samples-per-shard", "2", "--timeout-s", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "00001.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all its processes
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "4 of 4 pictures are in 2 shards" in said
    assert "the same command goes on after them" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]


def test_another_table_or_size_is_refused(server, tmp_path):
    out = tmp_path / "out"
    downloaded(table_of(server, tmp_path, ["ok/1", "ok/2"]), out, samples_per_shard=1)
    before = files(out)
    words = r"00001\.tar was not downloaded from these rows with these options"
    with pytest.raises(DataError, match=words):
        downloaded(table_of(server, tmp_path, ["ok/1", "ok/3"]), out, samples_per_shard=1)
    with pytest.raises(DataError, match="was not downloaded from these rows"):
        downloaded(table_of(server, tmp_path, ["ok/1", "ok/2"]), out, samples_per_shard=1, image_size_px=8)
    with pytest.raises(DataError, match=r"00001\.tar is not of this table, which fills 1 shards"):
        downloaded(table_of(server, tmp_path, ["ok/1"]), out, samples_per_shard=1)
    assert files(out) == before


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

    monkeypatch.setattr("t2i_pipelines.open_shard.write_shard", full)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device"):
        downloaded(table_of(server, tmp_path, ["ok/1", "ok/2"]), tmp_path / "out", samples_per_shard=1)
    assert not list((tmp_path / "out").glob("*.tar"))


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


class CountingServer(Server):
    """Counts how many requests wait at once."""

    def __init__(self) -> None:
        self.waiting = self.busiest = 0
        super().__init__()

    async def answer(self, request):
        self.waiting += 1
        self.busiest = max(self.busiest, self.waiting)
        await asyncio.sleep(0.01)
        self.waiting -= 1
        return await super().answer(request)
