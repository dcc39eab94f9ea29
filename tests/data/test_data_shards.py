import functools
import http.server
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_samples import good_members

from t2i.data.shards import ShardIndex, cache_folder, expand, local_path, open_shards
from t2i.errors import DataError


def test_index_agrees_with_webdataset_on_real_shards(shared_data):
    path = shared_data / "emoji" / "00002.tar"
    index = ShardIndex.scan(path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert index.keys == [sample["__key__"] for sample in theirs]
    for row, sample in enumerate(theirs):
        assert index.read(row) == {k: v for k, v in sample.items() if not k.startswith("__")}
    assert not index.truncated


def test_members_are_grouped_by_the_part_before_the_first_dot(write_tar):
    samples = {
        "a/x.y/0": {"JPG": b"1", "seg.png": b"22"},
        "a/x.y/1": {"txt": b""},
        "__meta__/0": {"json": b"3"},
    }
    index = ShardIndex.scan(write_tar("s.tar", samples))
    assert index.keys == ["a/x.y/0", "a/x.y/1"]
    assert index.read(0) == {"jpg": b"1", "seg.png": b"22"}
    assert index.read(1) == {"txt": b""}
    assert index.read(0, ["jpg"]) == {"jpg": b"1"}


def test_a_cut_at_any_byte_is_noticed(write_tar, tmp_path):
    """The archive of three samples ends with zero blocks; a cut before the first of them is a truncation."""
    samples = {str(i): {"txt": b"x" * 700, "json": b"{}"} for i in range(3)}
    whole = write_tar("whole.tar", samples)
    with tarfile.open(whole) as archive:
        ends = [m.offset_data + -(-m.size // 512) * 512 for m in archive]
    content, cut = whole.read_bytes(), tmp_path / "cut.tar"
    for length in [0, 1, 511, *range(512, ends[-1] + 1, 256), *ends]:
        cut.write_bytes(content[:length])
        index = ShardIndex.scan(cut)
        assert index.truncated, length
        assert len(index) >= 1
        complete = [row for row in range(len(index)) if not index.cut_short(row)]
        assert all(index.read(row) == samples[index.keys[row]] for row in complete)
        assert len(complete) >= sum(end <= length for end in ends[1::2]) - 1
    assert not ShardIndex.scan(whole).truncated


def test_an_empty_archive_is_not_a_truncated_one(write_tar):
    index = ShardIndex.scan(write_tar("s.tar", {}))
    assert len(index) == 0
    assert not index.truncated


def test_what_is_no_tar_is_named(tmp_path):
    (tmp_path / "s.tar").write_bytes(os.urandom(4096))
    with pytest.raises(DataError, match=r"s\.tar is not an uncompressed tar file"):
        open_shards(str(tmp_path / "s.tar"))


def test_a_name_that_comes_twice_is_named(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("0.txt"))
        archive.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(DataError, match=r"0\.txt twice"):
        open_shards(str(tmp_path / "s.tar"))


def test_braces_lists_and_file_urls(write_tar, tmp_path):
    for i in range(3):
        write_tar(f"0000{i}.tar", {str(i): good_members(i)})
    shards = open_shards([f"{tmp_path}/{{00000..00001}}.tar", f"file:{tmp_path}/00002.tar"])
    assert [shard.keys for shard in shards] == [["0"], ["1"], ["2"]]
    assert expand("a{1..2}.tar::b.tar") == ["a1.tar", "a2.tar", "b.tar"]


def test_a_missing_shard_is_named_with_its_key(write_tar, tmp_path):
    write_tar("00000.tar", {"0": good_members(0)})
    with pytest.raises(DataError, match=r"data\.heldout_shards names .*00001\.tar, which does not exist"):
        open_shards(f"{tmp_path}/{{00000..00001}}.tar", "data.heldout_shards")


def test_a_shard_that_vanishes_is_named(write_tar):
    path = write_tar("00000.tar", {"0": good_members(0)})
    index = ShardIndex.scan(path)
    path.unlink()
    with pytest.raises(DataError, match=r"00000\.tar cannot be read any more"):
        index.read(0)


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "s3://bucket/x.tar"])
def test_other_schemes_are_refused(url):
    with pytest.raises(DataError, match="allowed: a path, or a file:, http: or https: URL"):
        open_shards([url])


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(URL, folder, paths asked for) of a web server on this machine."""
    folder, asked = tmp_path / "web", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *args):
            asked.append(self.path)

        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path.endswith("broken.tar"):
                self.send_response(200)  # promises more than it gives
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(b"x" * 1000)
            else:
                super().do_GET()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", folder, asked
    httpd.shutdown()
    httpd.server_close()


def test_a_shard_behind_a_url_is_copied_once(server, write_tar):
    url, folder, asked = server
    (folder / "other").mkdir()
    for i, name in enumerate(["00000.tar", "00001.tar", "other/00000.tar"]):
        shutil.move(write_tar("s.tar", {str(i): good_members(i)}), folder / name)
    urls = [f"{url}/{{00000..00001}}.tar", f"{url}/other/00000.tar?token=1"]
    for _ in range(2):
        shards = open_shards(urls)
        assert [shard.keys for shard in shards] == [["0"], ["1"], ["2"]]
        assert [shard.read(0) for shard in shards] == [good_members(i) for i in range(3)]
    assert len(asked) == 3
    assert all(cache_folder() in shard.path.parents for shard in shards)
    assert cache_folder().is_relative_to(os.environ["XDG_CACHE_HOME"])


@pytest.mark.parametrize("name", ["missing.tar", "broken.tar"])
def test_a_url_that_fails_is_named_and_leaves_no_shard(server, name):
    url = f"{server[0]}/{name}"
    with pytest.raises(DataError, match=f"data.shards names {url}, which cannot be fetched"):
        open_shards([url])
    assert not list(cache_folder().glob("*.tar"))


def test_processes_that_wait_do_not_fetch_again(server, write_tar):
    url, folder, asked = server
    shutil.move(write_tar("s.tar", {"0": good_members(0)}), folder / "00000.tar")
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(local_path(f"{url}/00000.tar"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(asked) == 1


def test_offsets_are_compact_arrays(write_tar):
    index = ShardIndex.scan(write_tar("s.tar", {"0": {"txt": b"abc"}, "1": {"json": b"{}"}}))
    assert index.extensions == ("json", "txt")
    assert index.offsets.dtype == index.sizes.dtype == np.int64
    assert (index.offsets < 0).tolist() == [[True, False], [False, True]]
    assert index.sizes.tolist() == [[0, 3], [2, 0]]
