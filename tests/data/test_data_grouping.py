"""Members of a tar file as samples: wherever they lie, through links, and how much of them damage has lost."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_configs import data_config
from data_samples import good_members
from hypothesis import given, settings
from hypothesis import strategies as st
from open_shards import everything, opened, take

from t2i.data import grouping
from t2i.data.index import ShardIndex
from t2i.data.tar import BLOCK
from t2i.errors import DataError
from t2i_pipelines.inspecting.facts import look_at


def tar_of(path: Path, members: Sequence[tuple[str, bytes | str]], kind: bytes = tarfile.SYMTYPE) -> Path:
    """members: names with their content, or as text what they link to"""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = kind, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def samples_of(path: Path, index: ShardIndex | None = None) -> list[tuple[str, dict[str, bytes]]]:
    index = index or ShardIndex.scan(path)
    with path.open("rb") as file:
        return [
            (key, index.read(file.fileno(), row))
            for row, key in enumerate(index.keys)
            if row not in index.flaws
        ]


def by_extension(samples: dict[str, dict[str, bytes]]) -> list[tuple[str, bytes]]:
    """All members of one extension, then all of the next."""
    extensions = dict.fromkeys(extension for members in samples.values() for extension in members)
    return [
        (f"{key}.{e}", members[e]) for e in extensions for key, members in samples.items() if e in members
    ]


def test_all_pictures_followed_by_all_captions_are_samples(tmp_path):
    samples = {f"{i}": good_members(i) for i in range(12)}
    path = tar_of(tmp_path / "00000.tar", by_extension(samples))
    assert dict(samples_of(path)) == samples
    (batch,) = take(data_config(shards=str(path)), 1, batch_size=12)
    assert batch.bad == {}
    assert sorted(batch.caption) == sorted(f"sample {i}" for i in range(12))
    for key, caption, metadata in zip(batch.key, batch.caption, batch.metadata, strict=True):
        assert (caption, metadata["id"]) == (f"sample {key}", int(key))


def test_a_sample_without_its_other_part_counts(tmp_path):
    samples = {f"{i}": good_members(i) for i in range(12)}
    del samples["3"]["png"], samples["7"]["txt"]
    path = tar_of(tmp_path / "00000.tar", by_extension(samples))
    data = data_config(shards=str(path), max_bad_share=1.0)
    (batch,) = take(data, 1, batch_size=12)
    assert batch.bad == {"image": 1, "caption": 1}


members = st.tuples(st.sampled_from(["a", "b", "c/a", "d"]), st.sampled_from(["jpg", "TXT", "json", "x.txt"]))


@given(st.lists(members, max_size=14))
def test_in_any_order_no_member_is_lost_or_given_to_another_sample(tmp_path_factory, order):
    """Each content names its key. What repeats a name is a sample of its own, or counted as what cannot be told."""
    path = tmp_path_factory.mktemp("any") / "s.tar"
    tar_of(path, [(f"{key}.{ending}", f"{key} {i}".encode()) for i, (key, ending) in enumerate(order)])
    index = ShardIndex.scan(path)
    found = samples_of(path, index)
    assert set(index.flaws.values()) <= {"duplicate"}
    delivered = Counter()
    for key, sample in found:
        assert {content.decode().split()[0] for content in sample.values()} == {key}
        delivered.update((key, ending) for ending in sample)
    wanted = Counter((key, ending.lower()) for key, ending in order)
    assert delivered <= wanted
    assert {key for key, _ in (wanted - delivered)} <= {index.keys[row] for row in index.flaws}
    if max(Counter(wanted).values(), default=0) <= 1:
        assert dict(found) == {
            key: {e.lower(): f"{key} {i}".encode() for i, (k, e) in enumerate(order) if k == key}
            for key, _ in order
        }


def test_equal_keys_far_apart_that_repeat_a_name_are_samples_of_their_own_as_in_webdataset(tmp_path):
    once = [("0.jpg", b"a"), ("0.txt", b"a"), ("1.jpg", b"b"), ("1.txt", b"b")]
    again = [("0.txt", b"c"), ("0.jpg", b"c"), ("2.txt", b"d"), ("2.jpg", b"d")]
    path = tar_of(tmp_path / "s.tar", once + again)
    theirs = [
        (s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")})
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert samples_of(path) == theirs
    assert everything(opened([path])) == (
        ["0", "1", "0~2", "2"],
        {},
    )  # what is encoded of them has names of its own


def test_of_which_of_two_samples_a_caption_is_cannot_be_told_and_both_count(tmp_path):
    pictures = [("0.jpg", b"a"), ("1.jpg", b"b"), ("0.jpg", b"c")]
    path = tar_of(tmp_path / "s.tar", [*pictures, ("1.txt", b"b"), ("0.txt", b"?")])
    index = ShardIndex.scan(path)
    assert samples_of(path, index) == [("1", {"jpg": b"b", "txt": b"b"})]
    assert Counter(index.flaws.values()) == {"duplicate": 2}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_to_members_of_the_tar_are_followed(kind, tmp_path):
    up = "../" if kind == tarfile.SYMTYPE else ""  # hard links name members from the top
    members = [
        ("blobs/one", b"picture one"),
        ("a/0.jpg", f"{up}blobs/one"),
        ("a/0.txt", b"text"),
        ("a/1.jpg", "0.jpg" if kind == tarfile.SYMTYPE else "./a/0.jpg"),
        ("a/1.txt", b"other"),
    ]
    path = tar_of(tmp_path / "00000.tar", members, kind)
    index = ShardIndex.scan(path)
    wanted = [
        ("a/0", {"jpg": b"picture one", "txt": b"text"}),
        ("a/1", {"jpg": b"picture one", "txt": b"other"}),
    ]
    assert samples_of(path, index) == wanted
    again = ShardIndex.from_bytes(index.to_bytes(), "x")
    assert samples_of(path, again) == wanted
    with path.open("rb") as file:
        assert again.fits(file.fileno())


def test_a_symbolic_link_may_come_first_and_its_header_still_has_to_be_there(tmp_path):
    path = tar_of(tmp_path / "s.tar", [("0.txt", "b.txt"), ("b.txt", b"text")])
    index = ShardIndex.scan(path)
    assert samples_of(path, index) == [("0", {"txt": b"text"}), ("b", {"txt": b"text"})]
    content = bytearray(path.read_bytes())
    content[BLOCK + 124] ^= 1  # the size of b.txt
    path.write_bytes(content)
    with pytest.raises(OSError, match="is not at byte"):
        samples_of(path, index)


@pytest.mark.parametrize(
    "target",
    ["/etc/hostname", "../../../etc/hostname", "nothing.png", "0.png", "1.png", "folder", "sparse.png"],
)
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_that_lead_nowhere_or_out_of_the_tar_count(target, kind, tmp_path):
    (tmp_path / "nothing.png").write_bytes(good_members(0)["png"])  # beside the tar, not in it
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [(f"2.{e}", c) for e, c in good_members(2).items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, link in (("0.png", target), ("1.png", "0.png")):  # 1 leads to 0, which may lead to 1
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            archive.addfile(info)
    assert everything(opened([path])) == (["2"], {"link": 2})
    facts, _ = look_at(path, "00000", ShardIndex.scan(path), True, set(), 8)
    assert facts.causes == {"a link that leads out of the tar": 2}
    (batch,) = take(data_config(shards=str(path), max_bad_share=1.0), 1, batch_size=3)
    assert batch.bad == {"link": 2}


def test_a_link_that_no_sample_needs_loses_none(tmp_path):
    path = tar_of(tmp_path / "s.tar", [("0.txt", b"text"), ("0.cls", "/dev/null")])
    assert samples_of(path) == [("0", {"txt": b"text"})]


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_count(format, tmp_path):
    """As `tar --sparse` makes them: of a file with holes, the data between these."""
    for name, content in good_members(1).items():
        (tmp_path / f"1.{name}").write_bytes(content)
    with (tmp_path / "0.bmp").open("wb") as file:
        file.write(b"BM")
        file.truncate(1 << 20)
    path = tmp_path / "00000.tar"
    arguments = ["tar", "--sparse", f"--format={format}", "-cf", str(path), "-C", str(tmp_path), "0.bmp"]
    made = subprocess.run([*arguments, "1.png", "1.txt", "1.json"], capture_output=True, check=False)
    if made.returncode or path.stat().st_size > 1 << 19:
        pytest.skip("needs GNU tar and a file system with holes")
    index = ShardIndex.scan(path)
    assert [index.flaws[row] for row in sorted(index.flaws)] == ["sparse"]
    assert samples_of(path, index) == [("1", good_members(1))]


def sized(count: int, size: int = 12_000) -> dict[str, dict[str, bytes]]:
    """Samples of about `size` bytes, between half and half as much again."""
    draw = np.random.default_rng(0)
    return {
        f"{i:05d}": {
            "jpg": draw.bytes(int(draw.integers(size // 2, 3 * size // 2))),
            "txt": b"x" * 40,
            "json": b"{}",
        }
        for i in range(count)
    }


def damaged(path: Path, start: float, share: float, by: bytes | None = None) -> int:
    """Overwrites a share of the file from `start` on, in shares too. Returns how many samples it touched."""
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        spans = [(m.name.partition(".")[0], m.offset, m.offset_data + m.size) for m in archive]
    first, length = int(start * len(content)), int(share * len(content))
    stop = min(first + length, len(content))
    content[first:stop] = os.urandom(stop - first) if by is None else by * (stop - first)
    path.write_bytes(content)
    return len({key for key, begin, end in spans if begin < stop and end > first})


@pytest.mark.parametrize("by", [None, b"\0"])
@pytest.mark.parametrize("start", [0.0, 0.31, 0.75])
@pytest.mark.parametrize("layout", ["samples", "extensions"])
def test_what_lay_in_a_damaged_stretch_counts_by_its_bytes(start, layout, by, tmp_path):
    """A quarter of a shard of 500 samples: about 125 are lost."""
    samples = sized(500, 4000)
    in_order = [(f"{key}.{e}", content) for key, found in samples.items() for e, content in found.items()]
    path = tar_of(tmp_path / "00000.tar", in_order if layout == "samples" else by_extension(samples))
    touched = damaged(path, start, 0.25, by)
    index = ShardIndex.scan(path)
    whole = [key for key, found in samples_of(path, index) if found == samples[key]]
    lost = len(index) - len(whole)
    gone = 500 - len(whole)
    assert gone <= touched + 1  # a file without an end may be cut within its last sample
    assert lost >= gone - 0.12 * touched - 2
    if layout == "samples" or start < 0.5:  # else no caption is left to say which pictures are lost
        assert lost <= gone + 0.12 * touched + 2
    if layout == "samples":
        assert 100 <= lost <= 150


def test_a_share_of_losses_reaches_max_bad_share(tmp_path):
    samples = {f"{i:05d}": good_members(i, 40, 40) for i in range(150)}
    in_order = [(f"{key}.{e}", content) for key, found in samples.items() for e, content in found.items()]
    path = tar_of(tmp_path / "00000.tar", in_order)
    damaged(path, 0.3, 0.25)
    with pytest.raises(DataError, match=r"of \d+ samples read are bad \(damaged"):
        take(data_config(shards=str(path), max_bad_share=0.1), 40, batch_size=16)
    batches = take(data_config(shards=str(path), max_bad_share=0.5), 10, batch_size=15)
    assert 25 <= sum(batch.bad.get("damaged", 0) for batch in batches) <= 45


def test_a_hole_as_large_as_a_disk_stands_in_for_no_more_than_is_of_use(tmp_path, monkeypatch):
    monkeypatch.setattr(grouping, "MAX_LOST", 3)
    path = tar_of(tmp_path / "s.tar", [("0.txt", b"a"), ("1.txt", b"b")])
    content = path.read_bytes()
    path.write_bytes(content[:1024] + bytes(200 * 1024) + content[1024:])
    index = ShardIndex.scan(path)
    assert Counter(index.flaws.values()) == {"damaged": 6}


@pytest.mark.parametrize("factor", [20, 64, 512, 2048])
def test_zeros_that_fill_up_a_large_record_are_no_great_loss(factor, tmp_path):
    """`tar --blocking-factor`: the rest of a record cannot be told from zeros that replaced members."""
    path = tar_of(tmp_path / "s.tar", [(f"{i}.txt", b"a") for i in range(30)])
    content, record = path.read_bytes().rstrip(b"\0"), factor * BLOCK
    length = -(-len(content) // BLOCK) * BLOCK + 2 * BLOCK
    path.write_bytes(content.ljust(-(-length // record) * record, b"\0"))
    index = ShardIndex.scan(path)
    assert len(index.flaws) <= 1
    assert len(samples_of(path, index)) == 30


def test_what_lies_between_two_archives_in_one_file_is_no_great_loss(tmp_path):
    """`cat a.tar b.tar`: tarfile, and webdataset with it, reads the first alone."""
    first, second = (
        tar_of(tmp_path / f"{name}.tar", [(f"{name}{i}.txt", b"a") for i in range(4)]) for name in "ab"
    )
    path = tmp_path / "both.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    index = ShardIndex.scan(path)
    assert [key for key, _ in samples_of(path, index)] == [f"{name}{i}" for name in "ab" for i in range(4)]
    assert list(index.flaws.values()) == ["damaged"]


def test_more_endings_than_any_data_set_has_are_refused_in_a_sentence(tmp_path):
    path = tar_of(tmp_path / "00000.tar", [(f"photo.{i}.txt", b"a") for i in range(1001)])
    with pytest.raises(DataError, match=r"00000\.tar has members with more than 1000 different endings"):
        ShardIndex.scan(path)


def test_a_tar_of_many_members_is_scanned_within_some_bytes_for_each(tmp_path):
    import tracemalloc

    path, count = tmp_path / "s.tar", 20_000
    header = tarfile.TarInfo()
    with path.open("wb") as file:
        for extension in ("jpg", "txt"):
            for i in range(count // 2):
                header.name = f"{i:09d}.{extension}"
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(2 * BLOCK))
    tracemalloc.start()
    index = ShardIndex.scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index) == count // 2
    assert peak < 400 * count


@settings(max_examples=30)
@given(data=st.data())
def test_links_of_any_kind_and_damage_never_give_another_samples_bytes(tmp_path_factory, data):
    """Contents are names of their targets; a link may lead anywhere, and bytes of headers may change."""
    names = [f"{key}.{ending}" for key in "abc" for ending in ("txt", "jpg")]
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    targets = st.sampled_from([*names, "../a.txt", "/a.txt", "./b.jpg", "", "x/../c.txt"])
    members = [
        (name, data.draw(targets | st.none()) if data.draw(st.booleans()) else None) for name in chosen
    ]
    path = tmp_path_factory.mktemp("links") / "s.tar"
    kind = data.draw(st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE]))
    tar_of(path, [(n, n.encode() if t is None else t) for n, t in members], kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(members) - 1)) * BLOCK + data.draw(st.integers(0, BLOCK - 1))
        content[at] ^= data.draw(st.integers(0, 255))
    changed = bytes(content) != path.read_bytes()
    path.write_bytes(content)
    try:
        index = ShardIndex.scan(path)
    except DataError:  # its only header is gone
        assert changed
        return
    found = samples_of(path, index)
    if not changed:
        direct = {name: name for name, target in members if target is None}
        for key, sample in found:
            for extension, content in sample.items():
                name = f"{key}.{extension}"
                assert content.decode() == direct.get(name, content.decode())
                assert content.decode() in direct
        lost = {name for name, _ in members} - {f"{key}.{e}" for key, sample in found for e in sample}
        assert {name[0] for name in lost} <= {index.keys[row] for row in index.flaws}


def test_indexes_of_another_version_are_said_once_and_made_anew(tmp_path, monkeypatch, caplog):
    """In version 1 what lay apart was no sample."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples = {f"{i}": good_members(i) for i in range(3)}
    paths = [tar_of(tmp_path / f"0000{i}.tar", by_extension(samples)) for i in range(3)]
    with monkeypatch.context() as then:
        then.setattr("t2i.data.index.VERSION", 1)
        for path in paths:
            path.with_suffix(".index.npz").write_bytes(ShardIndex.scan(path).to_bytes())
    assert opened(paths).sizes.tolist() == [3, 3, 3]
    told = [message for message in caplog.messages if "version 1, allowed: 2" in message]
    assert len(told) == 1
    assert "`t2i data index` writes it anew" in told[0]
