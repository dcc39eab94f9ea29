"""The layout of written shards, read back by webdataset, and what is visible when writing stops half-way."""

import hashlib
import io
import json

import pytest
import webdataset as wds
from PIL import Image

from t2i.errors import DataError
from t2i_pipelines.shard_writer import Sample, complete_directory, png_sample, write_shards


def samples(count: int):
    for i in range(count):
        picture = Image.new("RGB", (5, 3), (i, 0, 255 - i))
        yield png_sample(picture, f"naïve picture {i}", {"licence": "MIT", "attributes": {"number": str(i)}})


def read(paths) -> list[dict]:
    return list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))


def test_layout_is_that_of_img2dataset(tmp_path):
    paths = write_shards(samples(5), tmp_path / "train", samples_per_shard=2)
    assert [p.name for p in sorted((tmp_path / "train").iterdir())] == ["00000.tar", "00001.tar", "00002.tar"]
    assert paths == sorted((tmp_path / "train").iterdir())
    found = read(paths)
    assert [s["__key__"] for s in found] == ["000000000", "000000001", "000010000", "000010001", "000020000"]
    for i, sample in enumerate(found):
        assert {k for k in sample if not k.startswith("__")} == {"png", "txt", "json"}
        assert sample["txt"].decode() == f"naïve picture {i}"
        assert Image.open(io.BytesIO(sample["png"])).getpixel((0, 0)) == (i, 0, 255 - i)
        assert json.loads(sample["json"]) == {
            "caption": f"naïve picture {i}",
            "url": None,
            "key": sample["__key__"],
            "status": "success",
            "error_message": None,
            "width": 5,
            "height": 3,
            "original_width": 5,
            "original_height": 3,
            "exif": None,
            "sha256": hashlib.sha256(sample["png"]).hexdigest(),
            "licence": "MIT",
            "attributes": {"number": str(i)},
        }


def test_formats_and_original_sizes_are_kept(tmp_path):
    (path,) = write_shards([Sample(b"...", "jpg", "a", 2, 3, 20, 30, url="http://x/y.jpg")], tmp_path)
    (sample,) = read([path])
    description = json.loads(sample["json"])
    assert sample["jpg"] == b"..."
    assert (description["original_width"], description["original_height"]) == (20, 30)
    assert description["url"] == "http://x/y.jpg"


def test_the_same_samples_give_the_same_bytes(tmp_path):
    (first,), (second,) = (write_shards(samples(3), tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_shard_that_is_not_complete_has_no_name(tmp_path):
    def interrupted():
        yield from samples(3)
        assert {p.name for p in tmp_path.iterdir()} == {"00000.tar"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path, samples_per_shard=2)
    assert [p.name for p in tmp_path.glob("*.tar")] == ["00000.tar"]


def test_shards_are_never_mixed_with_older_ones(tmp_path):
    write_shards(samples(1), tmp_path)
    with pytest.raises(DataError, match="already holds shards"):
        write_shards(samples(1), tmp_path)


@pytest.mark.parametrize("samples_per_shard", [0, 10_001])
def test_the_key_has_room_for_each_sample(tmp_path, samples_per_shard):
    with pytest.raises(DataError, match=f"samples_per_shard is {samples_per_shard}; allowed: 1 to 10000"):
        write_shards(samples(1), tmp_path, samples_per_shard)


def test_columns_cannot_replace_the_layout_s_own(tmp_path):
    with pytest.raises(ValueError, match="width"):
        write_shards([png_sample(Image.new("RGB", (1, 1)), "", {"width": 7})], tmp_path)


def test_a_directory_appears_complete_or_not_at_all(tmp_path):
    def interrupted():
        with complete_directory(tmp_path / "set") as unfinished:
            (unfinished / "file").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with complete_directory(tmp_path / "set") as unfinished:
        (unfinished / "file").touch()
        assert not (tmp_path / "set").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "file"]


def test_of_two_builders_the_first_to_finish_wins(tmp_path):
    with complete_directory(tmp_path / "set") as slow:
        (slow / "slow").touch()
        with complete_directory(tmp_path / "set") as fast:
            (fast / "fast").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "fast"]


def test_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="is not empty"), complete_directory(tmp_path):
        pass
    assert (tmp_path / "notes.txt").exists()
