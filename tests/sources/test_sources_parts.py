"""Jobs that several processes share and one completes: what they leave is what one process leaves, byte for byte."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from picture_server import Server, files, table_of
from PIL import Image

from t2i_cli.data import dedup, download, index, inspect
from t2i_pipelines import indexing
from t2i_pipelines.deduplication import dedup as deduplication
from t2i_pipelines.inspecting import inspection

PROCESSES = 3


@pytest.fixture(autouse=True)
def in_threads(monkeypatch) -> None:
    """Other processes take seconds to start."""
    for module in (inspection, indexing, deduplication):
        monkeypatch.setattr(
            module, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(1), raising=True
        )


@pytest.fixture
def shards(tmp_path) -> list[str]:
    """Of 0 to 150 samples, with flaws of all kinds: and one is no tar."""
    rng = np.random.default_rng(0)
    for number, count in enumerate((150, 7, 0, 40, 12)):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for at in range(count):
                picture = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
                if at % 5 == 0:
                    picture[:] = 100  # many of these are the same
                buffer = io.BytesIO()
                large = Image.fromarray(picture).resize((48 + at % 3, 32))
                large.save(buffer, ("JPEG", "PNG")[at % 2])
                data = buffer.getvalue() if at % 11 else b"no picture"
                metadata = json.dumps({f"words{at % 4}": ["a"] * (at % 3)}).encode()
                for name, content in ((("jpg", "png")[at % 2], data), ("txt", b"c" * at), ("json", metadata)):
                    info = tarfile.TarInfo(f"{number if at % 9 else 0}-{at}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (tmp_path / "2.tar").write_bytes(b"no tar")
    for path in tmp_path.glob("*.tar"):
        os.utime(path, (1e9, 1e9))  # those of seconds ago may still be written
    return [str(tmp_path / f"{number}.tar") for number in range(5)]


def in_turn(monkeypatch: pytest.MonkeyPatch, verb: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Each process of an array, the last one first and one of them twice, as after a requeue."""
    for rank in (2, 0, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(PROCESSES))
        verb(arguments)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")


@pytest.mark.parametrize("fast", [[], ["--fast"]])
def test_inspect(shards, tmp_path, monkeypatch, fast):
    def outcome(folder: Path, *more: str) -> list[str]:
        folder.mkdir(exist_ok=True)
        files = ["--json", str(folder / "facts.json"), "--sheet", str(folder / "sheet.png")]
        return [*shards, *fast, "--samples", "20", *files, *more]

    inspect.run(outcome(tmp_path / "one"))
    parts = ["--parts", str(tmp_path / "parts")]
    in_turn(monkeypatch, inspect.run, outcome(tmp_path / "many", *parts))
    assert list((tmp_path / "many").iterdir()) == []
    assert len(list((tmp_path / "parts").iterdir())) == 5
    looked: list[int] = []
    look_at = inspection.look_at
    monkeypatch.setattr(inspection, "look_at", lambda *args: looked.append(len(args[2])) or look_at(*args))
    inspect.run(outcome(tmp_path / "many", *parts))
    assert looked == [1] * 20  # the samples of the sheet alone
    for name in ("facts.json", "sheet.png"):
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_shard_that_was_looked_at_otherwise_is_looked_at_again(shards, tmp_path):
    parts = ["--parts", str(tmp_path / "parts"), "--json", str(tmp_path / "facts.json")]
    inspect.run([shards[1], "--fast", *parts])
    fast = json.loads((tmp_path / "facts.json").read_text())
    inspect.run([shards[1], *parts])
    assert json.loads((tmp_path / "facts.json").read_text())["samples"] == fast["samples"]
    Path(shards[1]).write_bytes(Path(shards[4]).read_bytes())
    inspect.run([shards[1], *parts])
    assert json.loads((tmp_path / "facts.json").read_text())["samples"] > fast["samples"]
    longer = json.loads((tmp_path / "facts.json").read_text())
    content = Path(shards[1]).read_bytes()  # of the same size
    Path(shards[1]).write_bytes(content.replace(b"c" * 11 + b"\0", b" " * 11 + b"\0"))
    inspect.run([shards[1], *parts])
    assert json.loads((tmp_path / "facts.json").read_text()) != longer


def test_a_shard_that_is_gone_counts_though_it_was_looked_at(shards, tmp_path):
    parts = ["--parts", str(tmp_path / "parts"), "--json", str(tmp_path / "facts.json")]
    inspect.run([*shards[:2], *parts])
    Path(shards[1]).unlink()
    inspect.run([*shards[:2], *parts])
    assert list(json.loads((tmp_path / "facts.json").read_text())["shards"]["unreadable"]) == [shards[1]]


def test_processes_that_share_need_a_place_for_what_they_find(shards, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(Exception, match="--parts is not given; allowed: a folder, where 3 processes share"):
        inspect.run(shards)


def test_index(shards, tmp_path, monkeypatch):
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    index.run([*shards, "--out", str(tmp_path / "one")])
    arguments = [*shards, "--out", str(tmp_path / "many")]
    in_turn(monkeypatch, index.run, arguments)
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == [
        f"{number}.index.npz" for number in range(5)
    ]
    index.run(arguments)
    found = [indexed(tmp_path / name) for name in ("one", "many")]
    assert found[0] == found[1]
    assert len(found[0]) == 7
    assert all("stamp" in shard for shard in found[0]["index.json"]["shards"].values())


def indexed(folder: Path) -> dict[str, Any]:
    """By name; the file of sizes has a new one each time."""
    summary = json.loads((folder / "index.json").read_text())
    digits = summary.pop("sizes")
    contents: dict[str, Any] = {path.name.replace(digits, ""): path.read_bytes() for path in folder.iterdir()}
    return contents | {"index.json": summary}


def test_dedup(shards, tmp_path, monkeypatch):
    good = [shard for shard in shards if not shard.endswith("2.tar")]
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    dedup.run([*good, str(tmp_path / "one" / "kept.arrow"), "--workers", "1"])
    arguments = [*good, str(tmp_path / "many" / "kept.arrow"), "--workers", "1"]
    in_turn(monkeypatch, dedup.run, arguments)
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["kept.hashes"]
    dedup.run(arguments)
    found = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("one", "many")
    ]
    assert found[0].keys() == found[1].keys() >= {"kept.arrow", "kept.report.json", "kept.report.png"}
    assert found[0] == found[1]


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def test_download(server, tmp_path, monkeypatch):
    paths = [*(f"ok/{i}" for i in range(17)), "status/404", *(f"ok/{i}" for i in range(20, 25))]
    table = table_of(server, tmp_path, paths, n=range(23))
    options = ["--samples-per-shard", "4", "--allow-private-addresses"]
    download.run([str(table), str(tmp_path / "one"), *options])
    server.calls.clear()
    in_turn(monkeypatch, download.run, [str(table), str(tmp_path / "many"), *options])
    assert set(server.calls.values()) == {1}  # nothing twice
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert len(files(tmp_path / "one")) > 6
