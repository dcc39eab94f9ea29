"""Planted duplicates are found, other pictures are not, and the groups are those of a search that tries all pairs."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter

from t2i.data.decode import decode_image
from t2i.data.selection import listed
from t2i.errors import ConfigError
from t2i_cli.data import dedup as command
from t2i_pipelines.deduplication import hashing
from t2i_pipelines.deduplication.dedup import Duplicates, find, hash_shards, write_kept
from t2i_pipelines.deduplication.near_duplicates import MAX_DISTANCE, group


def scene(seed: int, size: int = 256) -> Image.Image:
    """Coloured blobs: smooth as photos are, and different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.SMOOTH)


def encoded(picture: Image.Image, kind: str = "JPEG", quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write(path: Path, samples: list[tuple[str, bytes, tuple[int, int] | None]]) -> str:
    """(extension, picture, original height and width)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (extension, data, original) in enumerate(samples):
            about = (
                dict(zip(("original_height", "original_width"), original, strict=True)) if original else {}
            )
            for name, content in ((extension, data), ("json", json.dumps(about).encode())):
                info = tarfile.TarInfo(f"{int(path.stem):05d}{i:04d}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def found_in(shards: list[str], folder: Path, distance: int = 4, tolerance: int = 24) -> Duplicates:
    urls, hashes = hash_shards(shards, "phash", folder, 1, lambda done, total: None)
    return find(urls, hashes, distance, tolerance, lambda done, total: None)


def components(linked: np.ndarray) -> list[int]:
    """Labels by union-find over a full matrix."""
    parent = list(range(len(linked)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in np.argwhere(linked):
        parent[max(root(i), root(j))] = min(root(i), root(j))
    return [root(i) for i in range(len(linked))]


def same_partition(labels: np.ndarray, expected: list[int]) -> bool:
    pairs = set(zip(labels.tolist(), expected, strict=True))
    return len(pairs) == len(set(labels.tolist())) == len(set(expected))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(0, MAX_DISTANCE),
    st.sampled_from([0, 20, 60, 255]),
    st.integers(1, 120),
)
def test_groups_are_those_of_brute_force(seed, distance, tolerance, count):
    """Chains of codes that differ in a few bits each, many of them equal; thumbnails in families."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**64, 1 + count // 8, dtype=np.uint64)
    while len(codes) < count:
        flips = rng.integers(0, 64, rng.integers(0, 2 * distance + 2))
        codes = np.append(
            codes,
            rng.choice(codes) ^ np.bitwise_xor.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0),
        )
    codes = codes[:count]
    thumbnails = (rng.integers(0, 3, (len(codes), 1)) * 50 + rng.integers(0, 30, (len(codes), 4))).astype(
        np.uint8
    )
    labels = group(codes, lambda rows: thumbnails[rows], distance, tolerance, lambda done, total: None)
    bits = np.bitwise_count(codes[:, None] ^ codes[None, :])
    difference = np.abs(thumbnails[:, None].astype(int) - thumbnails[None, :]).max(-1)
    assert same_partition(labels, components((bits <= distance) & (difference <= tolerance)))


def test_no_pair_is_missed_among_many():
    """Every way to place the flipped bits between the bands, among codes that have nothing to do with one another."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    flipped = np.array(
        [sum(1 << int(bit) for bit in rng.choice(64, 4, replace=False)) for _ in codes], np.uint64
    )
    both = np.concatenate([codes, codes ^ flipped])
    blank = np.zeros((len(both), 1), np.uint8)
    labels = group(both, lambda rows: blank[rows], 4, 0, lambda done, total: None)
    assert (labels[:20_000] == labels[20_000:]).all()
    assert len(np.unique(labels)) == 20_000


def test_planted_duplicates(tmp_path):
    pictures = [scene(seed) for seed in range(30)]
    first = write(tmp_path / "00000.tar", [("jpg", encoded(picture), (256, 256)) for picture in pictures])
    planted = {
        "resized": encoded(pictures[0].resize((150, 150), Image.Resampling.LANCZOS)),
        "stretched": encoded(pictures[1].resize((300, 200), Image.Resampling.LANCZOS)),
        "recompressed": encoded(pictures[2], quality=30),
        "another format": encoded(pictures[3], "PNG"),
        "brightened": encoded(ImageEnhance.Brightness(pictures[4]).enhance(1.07)),
        "same bytes": encoded(pictures[5]),
        "negative": encoded(Image.eval(pictures[6], lambda value: 255 - value)),
        "mirrored": encoded(pictures[7].transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "other colours": encoded(Image.merge("RGB", pictures[8].split()[::-1])),
    }
    second = write(
        tmp_path / "00001.tar",
        [("png" if data[1:4] == b"PNG" else "jpg", data, (512, 512)) for data in planted.values()],
    )
    found = found_in([first, second], tmp_path / "hashes")
    partner = {name: int(found.keeper[i]) for i, name in enumerate(planted)}  # of pictures 0, 1, ...
    assert partner == {
        name: 30 + i if i < 6 else i for i, name in enumerate(planted)
    }  # the larger original is kept
    assert (found.exact, found.near) == (1, 5)
    assert found.keeper[9:].tolist() == list(range(9, 39))


def test_which_is_kept(tmp_path):
    """The largest original; of several the first."""
    sizes = [(10, 10), (30, 10), (10, 30), (20, 10)]
    shards = [
        write(tmp_path / f"{i:05d}.tar", [("png", encoded(scene(0, 200 + i), "PNG"), size)])
        for i, size in enumerate(sizes)
    ]
    assert found_in(shards, tmp_path / "hashes").keeper.tolist() == [1, 1, 1, 1]
    plain = [
        write(tmp_path / f"x/{i:05d}.tar", [("png", encoded(scene(0, size), "PNG"), None)])
        for i, size in enumerate((200, 240, 220))
    ]
    assert found_in(plain, tmp_path / "hashes").keeper.tolist() == [1, 1, 1]


def test_unusable_pictures_are_kept_and_reported(tmp_path):
    whole = encoded(scene(0))
    samples = [("jpg", whole, None), ("jpg", whole[: len(whole) // 2], None), ("jpg", b"not a picture", None)]
    shard = write(
        tmp_path / "00000.tar", [*samples, ("jpg", b"not a picture", None), ("txt", b"no picture", None)]
    )
    command.run([shard, str(tmp_path / "kept.arrow"), "--workers", "1"])
    report = json.loads((tmp_path / "kept.report.json").read_text())
    assert (report["samples"], report["kept"], report["unusable"]) == (5, 5, {"image": 4})
    assert [each["key"] for each in report["unusable_samples"]] == [f"00000{i:04d}" for i in (1, 2, 3, 4)]
    (kept,) = listed([str(tmp_path / "kept.arrow")])
    assert len(kept.keys) == 5


def test_hashes_are_imagehashs_and_computed_once(tmp_path, monkeypatch):
    """Scaled decoding of a large JPEG moves few bits, and none of a picture that is small already."""
    pictures = [encoded(scene(seed, size), quality=90) for seed, size in enumerate((64, 200, 640, 1500))]
    shard = write(tmp_path / "00000.tar", [("jpg", data, None) for data in pictures])
    path = hashing.hash_shard(shard, None, "phash", tmp_path / "hashes")
    found = hashing.Hashes.open(path)
    exact = [int(str(imagehash.phash(decode_image(data, "")[0])), 16) for data in pictures]
    bits = [(int(code) ^ other).bit_count() for code, other in zip(found.codes, exact, strict=True)]
    assert bits[:2] == [0, 0]
    assert max(bits) <= 2
    digests = [hashlib.sha256(data).digest()[:16] for data in pictures]
    assert [row.tobytes() for row in found.digests] == digests
    calls: list[str] = []
    real = hashing._hashed
    monkeypatch.setattr(hashing, "_hashed", lambda *job: calls.append(job[0]) or real(*job))
    assert hashing.hash_shard(shard, None, "phash", tmp_path / "hashes") == path
    assert not calls
    for job in ((["000000001"], "phash"), (None, "dhash")):  # other samples, another hash
        hashing.hash_shard(shard, *job, tmp_path / "hashes")
    write(tmp_path / "00000.tar", [("jpg", pictures[0], None)])  # another shard under the same name
    hashing.hash_shard(shard, None, "dhash", tmp_path / "hashes")
    assert len(calls) == 3
    length = (tmp_path / "00000.tar").stat().st_size
    write(tmp_path / "00000.tar", [("jpg", pictures[1], None)])  # of the same size, as tar fills up its files
    assert (tmp_path / "00000.tar").stat().st_size == length
    found = hashing.Hashes.open(hashing.hash_shard(shard, None, "dhash", tmp_path / "hashes"))
    assert found.digests[0].tobytes() == digests[1]


def test_the_command(tmp_path, capsys):
    """In two processes, over a selection, to shards of their own."""
    pictures = [scene(seed, 128) for seed in range(6)]
    shards = [
        write(
            tmp_path / f"{i:05d}.tar",
            [("jpg", encoded(picture, quality=90 - 20 * i), None) for picture in pictures],
        )
        for i in range(2)
    ]
    command.run([*shards, str(tmp_path / "out"), "--workers", "2", "--report", str(tmp_path / "found.json")])
    said = capsys.readouterr().out
    assert "Of 12 samples 0 have the same bytes as another, and 6 more are nearly the same as one" in said
    report = json.loads((tmp_path / "found.json").read_text())
    assert [(each["key"], each["kept_key"]) for each in report["removed"]] == [
        (f"00001000{i}", f"00000000{i}") for i in range(6)
    ]
    assert all(each["bits"] <= 4 and not each["same_bytes"] for each in report["removed"])
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.width > 128
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert tar.extractfile("000000005.jpg").read() == encoded(pictures[5], quality=90)
    command.run([str(tmp_path / "out/selection.arrow"), str(tmp_path / "again.arrow"), "--workers", "1"])
    assert "Of 6 samples 0 have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--distance", "12"], "--distance is 12; allowed: 0 to 11"),
        (["--tolerance", "256"], "--tolerance is 256; allowed: 0 to 255"),
        (["--hash", "colorhash"], "--hash is 'colorhash'; allowed: phash, dhash"),
    ],
)
def test_what_flags_allow(tmp_path, flags, words):
    shard = write(tmp_path / "00000.tar", [("png", encoded(scene(0, 16), "PNG"), None)])
    with pytest.raises(ConfigError, match=words):
        command.run([shard, str(tmp_path / "kept.arrow"), "--workers", "1", *flags])


def test_real_clip_art(shared_data, tmp_path):
    """The pictures of one shard, and a copy of it at another quality: each copy is found."""
    source = shared_data / "clipart/00004.tar"
    samples = []
    with tarfile.open(source) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                samples.append(("jpg", encoded(picture.resize((200, 200)), quality=80), None))
    copies = write(tmp_path / "00000.tar", samples)
    found = found_in([str(source), copies], tmp_path / "hashes")
    count = len(samples)
    assert found.near >= 0.95 * count
    assert write_kept(found, tmp_path / "kept.arrow") == 2 * count - found.near
