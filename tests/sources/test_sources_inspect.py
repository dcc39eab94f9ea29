"""What `t2i data inspect` counts is what webdataset, Pillow and numpy find, and no bytes bring it down."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from t2i.errors import DataError
from t2i_cli.data import inspect as verb
from t2i_pipelines.inspecting import contact_sheet as sheet_module
from t2i_pipelines.inspecting import inspection as module
from t2i_pipelines.inspecting.contact_sheet import contact_sheet, wrapped
from t2i_pipelines.inspecting.facts import Tile
from t2i_pipelines.inspecting.inspection import inspect_shards, percentiles


def encoded(size=(64, 48), form="JPEG", color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, form)
    return buffer.getvalue()


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def in_threads(monkeypatch) -> None:
    """Other processes take seconds to start; one test does start them."""
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))


def looked(*shards: Path, fast=False, tiles=0, seed=0, workers=2, progress=lambda share: None):
    return inspect_shards([str(shard) for shard in shards], fast, tiles, 32, seed, workers, progress)


def test_the_same_as_webdataset_and_numpy(shared_data, in_threads):
    paths = [shared_data / "emoji/00000.tar", shared_data / "clipart/00004.tar"]
    done = []
    facts = looked(*paths, progress=done.append).to_json()
    samples = list(wds.WebDataset([str(path) for path in paths], shardshuffle=False))
    pictures = [Image.open(io.BytesIO(sample["jpg"])) for sample in samples]
    captions = [sample["txt"].decode().strip() for sample in samples]
    sources = [json.loads(sample["json"]) for sample in samples]
    assert facts["samples"] == facts["pictures"] == len(samples)
    assert sum(done) == pytest.approx(2)
    assert facts["members"] == {"jpg": len(samples), "txt": len(samples), "json": len(samples)}
    assert facts["formats"] == Counter(picture.format for picture in pictures)
    assert facts["shards"]["bytes"] == sum(path.stat().st_size for path in paths)
    assert facts["flaws"] == {}
    original = [min(each["original_width"], each["original_height"]) for each in sources]
    for found, expected in (
        (facts["caption"]["characters"], list(map(len, captions))),
        (facts["caption"]["words"], [len(caption.split()) for caption in captions]),
        (facts["shorter_side_px"]["original"], original),
        (facts["shorter_side_px"]["stored"], [min(picture.size) for picture in pictures]),
        (
            facts["caption"]["texts_per_json_list"]["tags"],
            [len(e["tags"]) for e in sources if isinstance(e["tags"], list)],
        ),
    ):
        for share in module.PERCENTILES:
            assert found[f"p{share}"] == np.percentile(expected, share, method="inverted_cdf")
    assert facts["shorter_side_px"]["original"]["share_from_256"] == pytest.approx(
        np.mean(np.array(original) >= 256), abs=1e-4
    )
    assert looked(*paths, fast=True).to_json() == facts
    shared = {sample["__key__"] for sample in samples}
    assert facts["repeated_keys"] == len(samples) - len(shared)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.sampled_from([0, 1, 25, 50, 99, 100]))
def test_percentiles(values, share):
    expected = np.percentile(values, share, method="inverted_cdf")
    assert percentiles(Counter(values), (share,)) == {f"p{share}": expected}


def test_each_flaw_is_counted_by_its_cause_and_named(tmp_path, in_threads):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    broken = buffer.getvalue()[:-1000]
    path = tar_of(
        tmp_path / "a.tar",
        [
            ("good.jpg", encoded((64, 16))),
            ("good.txt", b" two words "),
            ("good.json", b'{"caption": ["x", "y"], "original_width": 2000, "original_height": 500}'),
            ("liar.jpg", encoded(form="PNG")),  # a PNG that is called jpg
            ("liar.txt", b"\xff\xfe"),
            ("cut.jpg", broken),
            ("cut.txt", b"c"),
            ("empty.png", encoded(form="PNG")),
            ("empty.txt", b" \n"),
            ("mute.webp", encoded(form="WEBP")),
            ("bare.txt", b"no picture"),
            ("bad.jpg", encoded()),
            ("bad.json", b"{"),
            ("bad.txt", b"t"),
            ("json.jpg", encoded()),
            ("json.json", b'{"caption": "from the JSON", "original_width": "12", "tags": [1, "a"]}'),
            ("good.jpg", encoded()),  # a key that came before, not next to it
            ("good.txt", b"t"),
        ],
    )
    report = looked(path, tiles=20)
    facts = report.to_json()
    assert {cause: each["samples"] for cause, each in facts["flaws"].items()} == {
        "caption is not text": 1,
        "picture not decodable": 1,
        "empty caption": 1,
        "no caption": 1,
        "no picture": 1,
        "JSON not readable": 1,
    }
    assert "sample cut: image" in facts["flaws"]["picture not decodable"]["first"][0]
    assert (facts["samples"], facts["pictures"], facts["repeated_keys"]) == (9, 7, 1)
    assert facts["formats"] == {"JPEG": 4, "PNG": 2, "WEBP": 1}
    assert facts["shorter_side_px"]["original"]["p50"] == 500
    assert facts["caption"]["texts_per_json_list"] == {"caption": {"known": 1, **percentiles(Counter([2]))}}
    assert facts["aspect_ratio"]["4 and more"] == 1
    assert [tile.note for tile in report.tiles if tile.note] == ["picture not decodable", "no picture"]
    assert "picture not decodable" not in looked(path, fast=True).to_json()["flaws"]  # its header is whole


def test_bombs(tmp_path, in_threads):
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")
    tar_of(tmp_path / "a.tar", [("a.png", buffer.getvalue()), ("a.txt", b"a")])
    for fast in (False, True):
        assert looked(tmp_path / "a.tar", fast=fast).facts.causes == {"too many pixels or bytes": 1}


def test_broken_tar_files(tmp_path, in_threads):
    members = [(f"{i}.{e}", encoded() if e == "jpg" else b"text") for i in range(8) for e in ("jpg", "txt")]
    whole = tar_of(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmember("3.jpg").offset
    (tmp_path / "cut.tar").write_bytes(whole[: third + 700])
    damaged = bytearray(whole)
    damaged[third : third + 512] = b"\xaa" * 512
    (tmp_path / "damaged.tar").write_bytes(damaged)
    (tmp_path / "no.tar").write_bytes(b"no tar file" * 500)
    report = looked(*(tmp_path / f"{name}.tar" for name in ("whole", "cut", "damaged", "no", "absent")))
    assert report.facts.causes["cut off at the end of the tar"] == 1
    assert (
        report.facts.causes["no picture"] == 1
    )  # of the sample whose header is damaged, the caption is left
    assert [Path(url).name for url in report.unreadable] == ["no.tar", "absent.tar"]
    assert report.shard_samples == [8, 4, 8]
    with pytest.raises(
        DataError, match=r"None of 1 shard can be read; of the first: .*no\.tar is not an unc"
    ):
        looked(tmp_path / "no.tar")


WHOLE: list[bytes] = []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_bytes_bring_it_down(tmp_path, in_threads, data):
    if not WHOLE:
        members = [("a.jpg", encoded()), ("a.txt", "é".encode()), ("a.json", b'{"original_width": 3}')]
        members += [("b.png", encoded(form="PNG")), ("b.txt", b"b"), ("c.gif", encoded(form="GIF"))]
        WHOLE.append(tar_of(tmp_path / "whole.tar", members).read_bytes())
    bytes_ = bytearray(WHOLE[0])
    headers = st.sampled_from(
        [i for i in range(0, len(bytes_), 512) if bytes_[i + 257 : i + 262] == b"ustar"]
    )
    anywhere = st.one_of(
        st.integers(0, len(bytes_) - 13), st.builds(lambda h, o: h + o, headers, st.integers(0, 511))
    )
    for place, new in data.draw(
        st.lists(st.tuples(anywhere, st.binary(min_size=1, max_size=12)), max_size=12)
    ):
        bytes_[place : place + len(new)] = new
    for header in data.draw(
        st.lists(headers, max_size=3)
    ):  # checksums that fit, so that the header is believed
        block = bytes_[header : header + 512]
        block[148:156] = b" " * 8
        bytes_[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    (tmp_path / "fuzzed.tar").write_bytes(bytes_[: data.draw(st.integers(0, len(bytes_)))])
    tar_of(tmp_path / "whole.tar", [])  # else a file that is no tar at all would be an error
    report = looked(tmp_path / "whole.tar", tmp_path / "fuzzed.tar", tiles=4)
    verb.tables(json.loads(json.dumps(report.to_json())))
    contact_sheet(report.tiles, 32)


def test_sizes_in_headers_do_not_ask_for_memory(tmp_path, in_threads):
    tar_of(tmp_path / "a.tar", [("a.jpg", encoded()), ("a.txt", b"a")])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        header = tar.getmember("a.txt").offset
    data[header + 124 : header + 136] = b"\x80" + (1 << 50).to_bytes(11, "big")
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    (tmp_path / "a.tar").write_bytes(data)
    assert looked(tmp_path / "a.tar").facts.causes == {"cut off at the end of the tar": 1}


def test_latents_are_counted_by_extension(tmp_path, in_threads):
    tar_of(tmp_path / "a.tar", [("a.safetensors", b"x" * 2000), ("a.json", b"{}"), ("b.safetensors", b"x")])
    report = looked(tmp_path / "a.tar", tiles=2)
    assert report.to_json()["members"] == {"safetensors": 2, "json": 1}
    assert report.facts.causes == {"no picture": 2, "no caption": 2}
    assert all(verb.tables(report.to_json()))


def test_the_choice_for_the_sheet_is_even_and_the_same_for_any_number_of_processes(tmp_path, in_threads):
    for shard, samples in enumerate((300, 3, 150)):
        members = [(f"{shard}-{i}.txt", f"{shard}".encode()) for i in range(samples)]
        tar_of(tmp_path / f"{shard}.tar", members)
    paths = [tmp_path / f"{shard}.tar" for shard in range(3)]
    one, other = looked(*paths, tiles=40, workers=1), looked(*paths, tiles=40, workers=3)
    assert one.tiles == other.tiles
    assert len(one.tiles) == 40
    totals = Counter[str]()
    for seed in range(40):
        totals.update(tile.caption for tile in looked(*paths, tiles=40, seed=seed).tiles)
    assert totals.total() == 1600
    expected = 1600 * 300 / 453  # hypergeometric, a standard deviation of about 18
    assert abs(totals["0"] - expected) < 80
    assert 2 <= totals["1"] <= 25


@given(st.text(max_size=400), st.integers(20, 300))
@settings(max_examples=50, deadline=None)
def test_captions_are_wrapped_to_the_width(text, width_px):
    font = ImageFont.load_default(12)
    lines = wrapped(text, font, width_px)
    assert len(lines) <= sheet_module.MAX_LINES
    assert all(font.getlength(line) <= width_px for line in lines if len(line) > 1)
    shown = "".join("".join(lines).split())
    whole = "".join(text.replace("\0", " ").encode("utf-8", "replace").decode().split())
    assert shown == whole or (len(lines) == 4 and shown[-1] == "…" and whole.startswith(shown[:-1]))


def test_any_caption_can_be_drawn():
    captions = [
        "漢字の見出し",
        "عنوان",
        "\ud800 half a pair",
        "nul \0",
        "😀",
        "[bold]no markup[/]",
        "W" * 3000,
        "",
    ]
    tiles = [Tile(Image.new("RGB", (32, 20), "red"), caption) for caption in captions]
    sheet = contact_sheet([*tiles, Tile(None, "x", "too many pixels or bytes")], 32)
    assert sheet.getcolors(10**6)
    red = sum(count for count, color in sheet.getcolors(10**6) if color == (255, 0, 0))
    assert red == 8 * 32 * 20


def test_the_command_with_real_processes(tmp_path, capsys):
    tar_of(
        tmp_path / "[a].tar",
        [(f"{i}.{e}", encoded() if e == "jpg" else b"[x] y") for i in range(3) for e in ("jpg", "txt")],
    )
    verb.run(
        [
            str(tmp_path / "[a].tar"),
            str(tmp_path / "absent.tar"),
            "--sheet",
            str(tmp_path / "new/sheet.png"),
            "--samples",
            "2",
            "--json",
            str(tmp_path / "new/report.json"),
        ]
    )
    said = capsys.readouterr().out
    assert "Wrote 2 samples to" in said
    assert "absent.tar" in said
    assert json.loads((tmp_path / "new/report.json").read_text())["samples"] == 3
    with Image.open(tmp_path / "new/sheet.png") as sheet:
        assert sheet.size[0] > 2 * verb.TILE_PX


def test_remote_shards_are_copied_and_cleared_away(tmp_path, in_threads, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    path = tar_of(tmp_path / "a.tar", [("a.jpg", encoded()), ("a.txt", b"a")])
    with fsspec.open("memory://inspect/a.tar", "wb") as file:
        file.write(path.read_bytes())
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    report = looked(*("memory://inspect/a.tar",), path)
    assert (report.facts.samples, report.repeated_keys) == (2, 1)
    assert not list((tmp_path / "temporary").iterdir())
