import io
import os
import tarfile

import numpy as np
import pytest
import webdataset
from data_samples import encode, good_members, noise
from hypothesis import given
from hypothesis import strategies as st

from t2i.data.decode import BadSample
from t2i.data.index import ShardIndex, _array
from t2i.data.tar import plain_member
from t2i.errors import DataError


def read(index: ShardIndex, path, row, extensions=None) -> dict[str, bytes]:
    with path.open("rb") as file:
        return index.read(file.fileno(), row, extensions)


def test_index_agrees_with_webdataset_on_real_shards(shared_data):
    path = shared_data / "emoji" / "00002.tar"
    index = ShardIndex.scan(path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert index.keys == [sample["__key__"] for sample in theirs]
    for row, sample in enumerate(theirs):
        assert read(index, path, row) == {k: v for k, v in sample.items() if not k.startswith("__")}
    assert not index.flaws


def test_members_are_grouped_by_the_part_before_the_first_dot(write_tar):
    samples = {
        "a/x.y/0": {"JPG": b"1", "seg.png": b"22"},
        "a/x.y/1": {"txt": b""},
        "__meta__/0": {"json": b"3"},
    }
    path = write_tar("s.tar", samples)
    index = ShardIndex.scan(path)
    assert index.keys == ["a/x.y/0", "a/x.y/1"]
    assert read(index, path, 0) == {"jpg": b"1", "seg.png": b"22"}
    assert read(index, path, 1) == {"txt": b""}
    assert read(index, path, 0, ["jpg"]) == {"jpg": b"1"}


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
        assert "truncated" in index.flaws.values(), length
        complete = [row for row in range(len(index)) if row not in index.flaws]
        assert all(read(index, cut, row) == samples[index.keys[row]] for row in complete)
        assert len(complete) >= sum(end <= length for end in ends[1::2]) - 1
    assert not ShardIndex.scan(whole).flaws


@given(
    st.text(max_size=110),
    st.integers(0, 8**11 + 5),
    st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE]),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]),
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=2),
    st.booleans(),
)
def test_plain_headers_are_read_as_tarfile_reads_them(name, size, kind, format, changes, mended):
    member = tarfile.TarInfo(name.replace("\0", ""))
    member.size, member.type = size, kind
    try:
        header = bytearray(member.tobuf(format)[-512:])
    except ValueError:  # too long or too large for ustar
        return
    for at, value in changes:
        header[at] = value
    if mended:  # a checksum that is right whatever the header says
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    found = plain_member(bytes(header), 1024)
    if found is not None:
        try:
            wanted = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
        except tarfile.HeaderError:  # of a field that says nothing about the data
            assert mended
            assert any(at in (*range(100, 124), *range(136, 148), *range(329, 345)) for at, _ in changes)
            return
        assert (found.name, found.size, found.type) == (wanted.name, wanted.size, wanted.type)
        assert (found.offset, found.offset_data) == (1024, 1536)
    elif not changes and kind == tarfile.REGTYPE and size < 8**11 and len(member.name.encode()) < 100:
        raise AssertionError("a plain header was not recognised")


def test_an_empty_archive_is_not_a_truncated_one(write_tar):
    index = ShardIndex.scan(write_tar("s.tar", {}))
    assert len(index) == 0
    assert not index.flaws


def test_what_is_no_tar_is_named(tmp_path):
    (tmp_path / "s.tar").write_bytes(os.urandom(4096))
    with pytest.raises(DataError, match=r"s\.tar is not an uncompressed tar file"):
        ShardIndex.scan(tmp_path / "s.tar")


def test_a_name_that_comes_twice_counts_as_a_loss(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for content in (b"1", b"22"):
            info = tarfile.TarInfo("0.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    index = ShardIndex.scan(tmp_path / "s.tar")
    assert index.keys == ["0", "0"]
    assert index.flaws == {1: "duplicate"}
    assert read(index, tmp_path / "s.tar", 0) == {"txt": b"1"}


def test_a_damaged_header_in_the_middle_loses_its_member_and_no_other(write_tar, tmp_path):
    """tarfile, and webdataset with it, stops there as if the archive ended."""
    samples = {str(i): {"txt": b"x" * 100, "json": b"{}"} for i in range(9)}
    path = write_tar("s.tar", samples)
    with tarfile.open(path) as archive:
        fourth = next(m for m in archive if m.name == "4.txt")
    content = bytearray(path.read_bytes())
    content[fourth.offset : fourth.offset + 100] = b"?" * 100
    path.write_bytes(content)
    assert (
        len(list(webdataset.WebDataset(str(path), shardshuffle=False, handler=webdataset.ignore_and_stop)))
        < 9
    )
    index = ShardIndex.scan(path)
    assert index.keys == [str(i) for i in range(9)]
    assert read(index, path, 4) == {"json": b"{}"}  # without a caption it counts when it is read
    assert all(read(index, path, i) == samples[str(i)] for i in range(9) if i != 4)


def test_offsets_are_compact_arrays(write_tar):
    index = ShardIndex.scan(write_tar("s.tar", {"0": {"txt": b"abc"}, "1": {"json": b"{}"}}))
    assert index.extensions == ("json", "txt")
    assert index.offsets.dtype == index.sizes.dtype == np.int64
    assert (index.offsets < 0).tolist() == [[True, False], [False, True]]
    assert index.sizes.tolist() == [[0, 3], [2, 0]]


def test_sizes_come_from_the_json_or_else_from_the_pictures_header(write_tar):
    turned = io.BytesIO()
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(noise(0, 20, 30)).save(turned, "JPEG", exif=exif)
    samples = {
        "0": good_members(0, 12, 16),
        "1": {"png": encode(noise(1, 7, 9))},
        "2": {"jpg": turned.getvalue()},
        "3": {"jpg": b"nothing"},
        "4": {"png": encode(noise(1, 7, 9)), "json": b"{"},
    }
    path = write_tar("s.tar", samples)
    index = ShardIndex.scan(path).with_sizes(path)
    assert index.original_px.tolist() == [[120, 160], [7, 9], [30, 20], [0, 0], [0, 0]]


def test_an_index_survives_the_file(write_tar, tmp_path):
    path = write_tar("s.tar", {f"k{i}é": good_members(i) for i in range(5)})
    path.write_bytes(path.read_bytes()[:-11_000])
    index = ShardIndex.scan(path).with_sizes(path)
    again = ShardIndex.from_bytes(index.to_bytes(), "s.index.npz")
    assert (again.keys, again.extensions, again.flaws) == (index.keys, index.extensions, index.flaws)
    assert again.file_bytes == path.stat().st_size
    for name in ("offsets", "sizes", "original_px"):
        assert getattr(again, name).tolist() == getattr(index, name).tolist()
    assert len(again.to_bytes()) < 100 * len(index) + 2000


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 1000])
def test_what_is_no_index_is_named(content):
    with pytest.raises(DataError, match=r"s\.index\.npz is not an index"):
        ShardIndex.from_bytes(content, "s.index.npz")


def test_an_index_with_a_pickle_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, version=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="is not an index"):
        ShardIndex.from_bytes(buffer.getvalue(), "s.index.npz")


@pytest.mark.parametrize(
    "array",
    [
        np.array(7),
        np.zeros((0, 3)),
        np.arange(12, dtype=np.int32).reshape(3, 4),
        np.asfortranarray(np.eye(3)),
    ],
)
def test_arrays_are_read_as_numpy_does(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    found = _array(buffer.getvalue())
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("damage", [slice(0, 1), slice(6, 7), slice(-1, None)])
def test_a_damaged_array_is_refused(damage):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(12))
    data = bytearray(buffer.getvalue())
    data[damage] = b"" if damage.stop is None else b"\xff"
    with pytest.raises(ValueError, match=r"."):
        _array(bytes(data))


def test_bad_samples_say_their_cause():
    error = BadSample("image", "k", "why")
    assert (error.cause, error.key) == ("image", "k")
    assert str(error) == "sample k: image: why"
