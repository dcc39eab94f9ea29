"""Shards, indexes and selections that somebody made who means no good, or whose tools wrote names in other ways."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import good_members
from open_shards import QUICK, everything, opened

from t2i.data import index as index_module
from t2i.data import sources
from t2i.data.encoded import RECORD, VERSION, Record
from t2i.data.grouping import MAX_LINKS
from t2i.data.index import ShardIndex
from t2i.data.tar import members
from t2i.errors import DataError
from t2i_pipelines import shard_metadata
from t2i_pipelines.inspecting.facts import look_at
from t2i_pipelines.inspecting.inspection import inspect_shards
from t2i_pipelines.shard_metadata import local_copy, metadata_of, scan

ODD = [
    "reference://a.tar",
    "generic://x/a.tar",
    "jupyter://x/a.tar",
    "dir://a.tar",
    "http://[::1",
    "ftp://127.0.0.1:1/a.tar",
]


def tar_of(path: Path, samples: dict[str, dict[str, bytes]], **how) -> Path:
    with tarfile.open(path, "w", **how) as archive:
        for key, parts in samples.items():
            for extension, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("url", ODD)
def test_an_address_that_no_library_takes_is_a_source_that_cannot_be_read(url):
    assert not sources.is_local(url)
    with pytest.raises(sources.SourceError, match="cannot be read"):
        sources.size(url, QUICK)


def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(sources.SourceError, match="it is no file"):
            sources.read_bytes(str(tmp_path / name), QUICK)


@pytest.mark.parametrize(
    "change",
    [
        {"preparation": {"size_px": [float("inf"), 2], "bucket_step_px": None, "max_aspect": 2}},
        {"preparation": {"size_px": [64, 64], "bucket_step_px": "a", "max_aspect": 2}},
        {"preparation": {"size_px": [64, 64], "bucket_step_px": None, "max_aspect": "q"}},
        {"features": []},
        {"features": {"latents": []}},
        {"features": {"latents": {"of": "sound", "tensors": ["a"], "hash": "a", "made_by": "a"}}},
        {"features": {"latents": {"of": "image", "tensors": [1], "hash": "a", "made_by": "a"}}},
        {"features": {"latents": {"of": "image", "tensors": ["a"], "hash": "a", "made_by": 1}}},
        {"features": {"latents": {"of": "image", "tensors": ["a"], "hash": "a"}}},
        {"autoencoder": "a", "text": None, "made_by": []},  # as it was once
        {"autoencoder": 1, "text": None, "made_by": {"autoencoder": "a"}},
        {"flip": "no"},
    ],
)
def test_a_record_of_other_kinds_is_none(change, tmp_path):
    good = {
        "version": VERSION,
        "preparation": {"size_px": [64, 64], "bucket_step_px": None, "max_aspect": 2.0},
        "features": {"latents": {"of": "image", "tensors": ["a"], "hash": "a", "made_by": "a run"}},
        "flip": False,
        "dtype": "float16",
    }
    (tmp_path / RECORD).write_text(json.dumps(good))
    assert Record.read(str(tmp_path), QUICK).preparation.size_px == (64, 64)
    (tmp_path / RECORD).write_text(json.dumps(good | change))
    with pytest.raises(DataError, match="is not a record of"):
        Record.read(str(tmp_path), QUICK)


def test_protocols_are_not_joined(tmp_path):
    (tmp_path / "refs.json").write_text(json.dumps({"version": 1, "refs": {"a.tar": "text"}}))
    for url in (f"reference://a.tar::file://{tmp_path}/refs.json", f"filecache::file://{tmp_path}/refs.json"):
        with pytest.raises(sources.SourceError, match="joins protocols; allowed: one"):
            sources.read_bytes(url, QUICK)


def test_links_are_followed_as_far_as_linux_follows_them(tmp_path):
    count = 2 * MAX_LINKS
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for at in range(count):
            info = tarfile.TarInfo(f"{at:03d}.png")
            info.type, info.linkname = tarfile.SYMTYPE, f"{at + 1:03d}.png"
            archive.addfile(info)
        info = tarfile.TarInfo(f"{count:03d}.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"png"))
    index = ShardIndex.scan(tmp_path / "00000.tar")
    assert index.flaws == dict.fromkeys(range(count - MAX_LINKS), "link")


class Counting(io.FileIO):
    reads = 0

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        return super().read(size)


@pytest.mark.parametrize("zeros", [512, 5 * 512, (1 << 20) - 512, (1 << 20) + 1536, 5 << 20])
def test_zeros_between_members_take_few_reads(zeros, tmp_path):
    parts = [tar_of(tmp_path / f"{i}.tar", {f"k{i}": good_members(i)}).read_bytes() for i in range(2)]
    end = parts[0].rstrip(b"\0")
    first = end + bytes(-len(end) % 512)
    (tmp_path / "00000.tar").write_bytes(first + bytes(zeros) + parts[1])
    with Counting(tmp_path / "00000.tar") as file:
        found = [each.name for each in members(file, "00000.tar") if isinstance(each, tarfile.TarInfo)]
        assert file.reads < 60
    assert found == [f"k{i}.{extension}" for i in range(2) for extension in good_members(i)]


@pytest.mark.parametrize("name", ["../../x/e", "n\nl\x1b[31m", "short"])
def test_a_member_that_an_extended_header_renames_is_read_as_webdataset_does(name, tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for extension, content in good_members(0).items():
            info = tarfile.TarInfo(f"other.{extension}")
            info.size, info.pax_headers = len(content), {"path": f"{name}.{extension}"}
            archive.addfile(info, io.BytesIO(content))
    assert everything(opened([tmp_path / "00000.tar"])) == ([name], {})


def test_an_index_that_unpacks_to_more_than_any_is_refused_before_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_INDEX_BYTES", 10_000)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        array = io.BytesIO()
        np.save(array, np.zeros(20_000, dtype=np.uint8))
        archive.writestr("version.npy", array.getvalue())
    with pytest.raises(DataError, match="allowed: 10000"):
        ShardIndex.from_bytes(packed.getvalue(), "00000.index.npz")


def test_jobs_unpack_no_more_than_is_allowed_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_metadata, "MAX_UNPACKED_GIB", 1 / 1024)
    monkeypatch.setattr(shard_metadata.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "00000.tar.gz").write_bytes(gzip.compress(bytes(3 << 20)))
    with pytest.raises(DataError, match="unpacks to more"), local_copy(str(tmp_path / "00000.tar.gz")):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["00000.tar.gz"]


def test_a_copy_is_named_as_the_shard_that_it_is_of(tmp_path):
    path = tmp_path / "00000.tar.gz"
    path.write_bytes(gzip.compress(b"no tar" * 1000))
    with (
        local_copy(str(path)) as copy,
        pytest.raises(DataError, match=r"00000\.tar\.gz is not an uncompressed"),
    ):
        scan(copy, str(path))
    whole = tar_of(tmp_path / "whole.tar", {"a": good_members(0), "b": good_members(1)}).read_bytes()
    path.write_bytes(gzip.compress(whole[: good_members_bytes(0)] + b"x" * 9000))
    report = inspect_shards([str(path)], True, 0, 16, 0, 1, lambda _: None)
    named = [name for names in report.facts.named.values() for name in names]
    assert named
    assert not any("shard.tar" in name for name in named)


def good_members_bytes(number: int) -> int:
    return sum(512 + -(-len(content) // 512) * 512 for content in good_members(number).values())


def test_a_name_that_tables_and_selections_cannot_hold_is_one_sentence(tmp_path):
    path = tar_of(
        tmp_path / "00000.tar", {"caf\xe9": good_members(0)}, encoding="latin-1", format=tarfile.GNU_FORMAT
    )
    assert everything(opened([path])) == (["caf\udce9"], {})
    with pytest.raises(DataError, match=r"has a sample 'caf\\udce9', which is not UTF-8"):
        metadata_of(str(path))


def test_one_sample_that_cannot_be_read_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "MAX_MEMBER_BYTES", 2000)
    large = {**good_members(1), "txt": b"x" * 3000}
    path = tar_of(tmp_path / "00000.tar", {"a": good_members(0), "b": large, "c": good_members(2)})
    table, _ = metadata_of(str(path))
    assert dict(zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True)) == {
        "a": "success",
        "b": "unreadable",
        "c": "success",
    }


def test_inspect_counts_a_sample_that_cannot_be_read_and_goes_on(tmp_path):
    path = tar_of(tmp_path / "00000.tar", {key: good_members(at) for at, key in enumerate("abc")})
    index = ShardIndex.scan(path)
    index.offsets[1] += 512
    facts, _ = look_at(path, "00000.tar", index, False, set(), 16)
    assert (facts.samples, facts.pictures) == (3, 2)
    assert facts.causes == {"not to be read at its place": 1}


def test_metadata_that_arrow_cannot_hold_as_it_is(tmp_path):
    odd = [
        '{"caption": "a \\ud800"}',
        '{"\\udc00": 1}',
        '{"n": 1' + "0" * 30 + "}",
        '{"n": 2}',
        '{"n": [1e999]}',
    ]
    samples = {f"k{at}": {**good_members(at), "json": text.encode()} for at, text in enumerate(odd)}
    table, _ = metadata_of(str(tar_of(tmp_path / "00000.tar", samples)))
    assert table["status"].to_pylist() == ["success"] * len(odd)
    assert table["caption"][0].as_py() == "a ?"
    assert table["n"].to_pylist() == [None, None, "1" + "0" * 30, "2", "[Infinity]"]
    samples.popitem()
    table, _ = metadata_of(str(tar_of(tmp_path / "00000.tar", samples)))
    assert table["n"].to_pylist() == [None, None, "1" + "0" * 30, "2"]
