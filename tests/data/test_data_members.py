"""Which member of a sample is its picture, its caption and its JSON; which formats are pictures."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from data_configs import data_config
from data_samples import encode, good_members, noise
from hypothesis import given
from hypothesis import strategies as st
from open_shards import take
from PIL import Image

from t2i.data.captions import parse_captions, parse_metadata
from t2i.data.decode import BadSample, decode_image, image_bytes
from t2i.data.index import ShardIndex
from t2i.data.members import PICTURE_ENDINGS, PICTURE_FORMATS, SAMPLE_ENDINGS, UNREAD_ENDINGS, among, member
from t2i_pipelines.inspecting.facts import look_at
from t2i_pipelines.shard_metadata import metadata_of

# Those that start a program, hold whatever they like, only write, or cannot be told from other bytes.
NOT_OPENED = {"EPS", "WMF", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "SPIDER", "IMT"}


def test_every_format_that_pillow_opens_is_read_or_left_out_on_purpose():
    endings: dict[str, set[str]] = {}
    for ending, format in Image.registered_extensions().items():
        endings.setdefault(format, set()).add(ending.removeprefix("."))
    for format in endings.keys() - NOT_OPENED:
        assert endings[format] <= set(PICTURE_FORMATS.get(format, ())), format
    assert not NOT_OPENED & PICTURE_FORMATS.keys()
    assert len(set(PICTURE_ENDINGS)) == len(PICTURE_ENDINGS)
    assert not set(PICTURE_ENDINGS) & {*UNREAD_ENDINGS, "txt", "json"}


@pytest.mark.parametrize("format", sorted(Image.SAVE.keys() & PICTURE_FORMATS.keys()))
def test_what_pillow_writes_is_read_by_every_ending_of_its_format(format, write_tar):
    mode = {"BLP": "P", "XBM": "1", "MSP": "1"}.get(format, "RGB")
    image = Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format)
    samples = {
        f"{i}": {ending.upper(): buffer.getvalue(), "txt": b"white"}
        for i, ending in enumerate(PICTURE_FORMATS[format])
    }
    data = data_config(shards=str(write_tar("00000.tar", samples)), max_bad_share=1.0)
    (batch,) = take(data, 1, batch_size=len(samples), size_px=16)
    assert batch.bad == {}
    assert batch.image.min() > 0.97


def test_bytes_that_only_look_like_a_format_without_a_signature_are_no_picture():
    """The header of a TGA file of 4 x 4 pixels may be the beginning of anything."""
    tga = bytes([0, 0, 2]) + bytes(9) + bytes([4, 0, 4, 0, 24, 0]) + bytes(48)
    with pytest.raises(BadSample, match="image"):
        decode_image(tga, "k")


@pytest.mark.parametrize("ending", ["heic", "jxl", "svg", "image.heic"])
def test_a_picture_of_a_kind_that_is_not_read_counts_as_such(ending, write_tar):
    samples = {"0": good_members(0), "1": {ending: b"whatever", "txt": b"a caption"}}
    path = write_tar("00000.tar", samples)
    data = data_config(shards=str(path), max_bad_share=1.0)
    (batch,) = take(data, 1, batch_size=2)
    assert batch.bad == {"format": 1}
    facts, _ = look_at(path, "00000", ShardIndex.scan(path), True, set(), 8)
    assert facts.causes == {"picture of a kind that is not read": 1}


def test_parts_of_names_after_the_first_dot_are_found_by_their_last(write_tar):
    """webdataset's convention: `000.image.jpg` is the member "image.jpg" of the sample 000."""
    samples = {
        f"{i}": {
            "image.png": encode(np.full((8, 8, 3), 40 * i, np.uint8)),
            "caption.txt": f"sample {i}".encode(),
            "meta.json": json.dumps({"id": i, "original_height": 80, "original_width": 90}).encode(),
        }
        for i in range(4)
    }
    path = write_tar("00000.tar", samples)
    (batch,) = take(data_config(shards=str(path)), 1, size_px=8)
    assert batch.bad == {}
    for number, caption, image in zip(batch.key, batch.caption, batch.image, strict=True):
        assert caption == f"sample {number}"
        np.testing.assert_allclose(((image + 1) * 127.5).numpy(), 40 * int(number), atol=0.01)
    assert [each["id"] for each in batch.metadata] == [int(key) for key in batch.key]
    index = ShardIndex.scan(path).with_sizes(path)
    assert index.original_px.tolist() == [[80, 90]] * 4
    facts, _ = look_at(path, "00000", index, False, set(), 8)
    assert (facts.pictures, facts.characters.total(), dict(facts.causes)) == (4, 4, {})
    table, _ = metadata_of(str(path))
    assert table["caption"].to_pylist() == [f"sample {i}" for i in range(4)]


def test_plain_names_come_before_dotted_ones_and_those_are_then_not_read(write_tar):
    samples = {
        "0": good_members(0) | {"seg.png": encode(noise(1)), "alt.txt": b"other", "boxes.json": b"[]"},
        "1": {
            "jpg": encode(noise(2), "JPEG"),
            "mask.png": encode(noise(3)),
            "caption.txt": b"one",
            "raw": b"4" * 1000,
            "webp": b"5",
        },
    }
    path = write_tar("00000.tar", samples)
    index = ShardIndex.scan(path)
    with path.open("rb") as file:
        assert index.read(file.fileno(), 0, SAMPLE_ENDINGS) == good_members(0)
        assert set(index.read(file.fileno(), 1, SAMPLE_ENDINGS)) == {"jpg", "caption.txt"}


def test_of_several_dotted_members_the_one_that_is_named_so_is_meant():
    depth, image, mask = (encode(noise(i)) for i in range(3))
    assert image_bytes({"depth.png": depth, "image.png": image, "mask.png": mask}, "k") == image
    with pytest.raises(BadSample, match="none that is meant") as error:
        image_bytes({"depth.png": depth, "mask.png": mask}, "k")
    assert error.value.cause == "image"
    texts = {"alt.txt": b"alt", "caption.txt": b"caption"}
    assert list(parse_captions(texts, {}, ("txt",), "k")) == ["caption"]
    with pytest.raises(BadSample, match="none under txt"):
        parse_captions({"alt.txt": b"alt", "title.txt": b"title"}, {}, ("txt",), "k")
    assert parse_metadata({"boxes.json": b"[]", "poses.json": b"[]"}, "k") == {}


names = st.lists(
    st.sampled_from(["jpg", "png", "txt", "json", "cls", "heic", "image", "mask", "caption", "", "é"]),
    min_size=1,
    max_size=3,
).map(".".join)


@given(st.sets(names, max_size=6))
def test_what_is_meant_is_among_what_is_read(there):
    for endings in (PICTURE_ENDINGS, UNREAD_ENDINGS, ("txt",), ("json",)):
        found = among(tuple(sorted(there)), SAMPLE_ENDINGS)
        assert found <= there
        meant = member(there, endings)
        if endings != UNREAD_ENDINGS or member(there, PICTURE_ENDINGS) is None:
            assert meant == member(found, endings) or any(
                e.rpartition(".")[2] in PICTURE_ENDINGS for e in found
            )
        if set(endings) & there:
            assert meant in endings
