"""A full disk and a parent that is a file: one sentence from every data job, nothing half-written left, and the same
command goes on once there is space."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_cli.main import main

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
for package in ("duckdb", "faiss", "imagehash", "aiohttp"):
    pytest.importorskip(package)

SHARDS, ONE = "SHARDS", "ONE"
# Arguments, {} for what is written; the bytes at which the disk is full.
JOBS = {
    "pack": (["IN", "{}", "--samples-per-shard", "2"], 20_000),
    "index": ([SHARDS, "--out", "{}", "--processes", "1"], 400),
    "filter a table": (["TABLE", "{}/kept.parquet"], 4_000),
    "filter to a selection": ([SHARDS, "{}/kept.arrow", "--min-shorter-side-px", "1"], 300),
    "filter to shards": ([SHARDS, "{}", "--min-shorter-side-px", "1"], 20_000),
    "dedup": ([SHARDS, "{}/kept.arrow", "--workers", "1"], 300),
    "inspect": ([ONE, "--json", "{}/facts.json"], 300),
    "inspect to a sheet": ([ONE, "--sheet", "{}/sheet.png"], 300),
    "download": (
        ["URLS", "{}", "--samples-per-shard", "1", "--retries", "0", "--allow-private-addresses"],
        700,
    ),
}
LONG = ("inspect", "inspect to a sheet", "download")  # they start processes three times
WHOLE = {"selection.arrow"}  # what may be there when the disk is full, as it is complete


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, list[str]]:
    from t2i_pipelines.pack import pack
    from t2i_pipelines.rows import rows_of

    folder = tmp_path_factory.mktemp("sources")
    (folder / "in").mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"in/{i}.png")
        (folder / f"in/{i}.txt").write_text(f"caption {i}")
    pack(rows_of(folder / "in"), folder / "shards", 2, lambda done: None)
    captions = [os.urandom(20).hex() for _ in range(3000)]
    pq.write_table(pa.table({"caption": captions}), folder / "table.parquet")
    nowhere = pa.table({"url": ["http://127.0.0.1:1/"] * 3, "caption": ["a"] * 3})
    pq.write_table(nowhere, folder / "urls.parquet")
    shards = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    return {
        "IN": [str(folder / "in")],
        "TABLE": [str(folder / "table.parquet")],
        "URLS": [str(folder / "urls.parquet")],
        SHARDS: shards,
        ONE: shards[:1],
    }


@contextlib.contextmanager
def disk_of(num_bytes: int) -> Iterator[None]:
    """No file gets longer than that; processes that are started meanwhile are held to it too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def call(job: str, sources: dict[str, list[str]], out: Path, monkeypatch) -> int:
    arguments = [each for one in JOBS[job][0] for each in sources.get(one, [one.format(out)])]
    monkeypatch.setattr(sys, "argv", ["t2i", "data", job.split()[0], *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "job", [pytest.param(each, marks=pytest.mark.slow if each in LONG else ()) for each in JOBS]
)
def test_a_full_disk(job, sources, tmp_path, monkeypatch, capsys):
    with disk_of(JOBS[job][1]):
        assert call(job, sources, tmp_path / "out", monkeypatch) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith(f"t2i data {job.split()[0]}: ")
    assert f"{tmp_path / 'out'}" in said[0]
    assert "File too large" in said[0]
    assert files(tmp_path / "out") <= WHOLE
    assert call(job, sources, tmp_path / "out", monkeypatch) == 0  # there is space again
    assert call(job, sources, tmp_path / "other", monkeypatch) == 0
    named = {name for name in files(tmp_path / "out") if not name.endswith(".sizes")}  # of a random name
    assert named == {name for name in files(tmp_path / "other") if not name.endswith(".sizes")}


@pytest.mark.parametrize("job", JOBS)
def test_a_parent_that_is_a_file(job, sources, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file/deep"):
        assert call(job, sources, out, monkeypatch) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        assert f"{tmp_path / 'file'}" in said[0]
    assert (tmp_path / "file").read_text() == "mine"
    assert files(tmp_path) == {"file"}


@pytest.mark.parametrize("finished", [1, 2])
def test_what_was_finished_stays(sources, tmp_path, monkeypatch, finished):
    """The disk is full at the second or third shard of pack."""
    from t2i_pipelines import pack as module

    real = module.write_shard

    def full(samples, path, shard):
        real(samples, path, shard)
        if shard == finished:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_shard", full)
    assert call("pack", sources, tmp_path / "out", monkeypatch) == 2
    endings = (".parquet", ".tar", "_stats.json")
    assert files(tmp_path / "out") == {f"{i:05d}{end}" for i in range(finished) for end in endings}
    monkeypatch.setattr(module, "write_shard", real)
    assert call("pack", sources, tmp_path / "out", monkeypatch) == 0
    assert files(tmp_path / "out") == {f"{i:05d}{end}" for i in range(3) for end in endings}


@pytest.mark.parametrize(
    "arguments",
    [
        "pack none out/deep",
        "download none.csv out/deep",
        "filter none.tar out/deep",
        "filter none.csv out/deep.parquet",
        "dedup none.tar out/deep",
        "dedup none.tar out/deep/kept.arrow --report out/other/report.json",
        "score none.tar --out out/deep",
        "index none.tar --out out/deep",
        "inspect none.tar --parts out/parts --json out/json/a.json --sheet out/sheet/a.png",
        "encode out/deep stage=ldm data=shards data.shards=none.tar",
    ],
)
def test_no_folder_is_left_of_a_job_that_fails_at_once(t2i, arguments):
    """The sentence begins with the job's name."""
    said = t2i("data", *arguments.split()).sentence
    assert said.startswith(f"t2i data {arguments.split()[0]}: ")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "job", ["inspect x.tar", "index x.tar", "dedup x.tar kept.arrow", "filter x.tar kept.arrow"]
)
@pytest.mark.parametrize(
    ("what", "reason"),
    [("nothing", "does not exist|: No such file or directory"), ("a pipe", "it is no file")],
)
def test_a_shard_that_is_none(t2i, job, what, reason):
    """A named pipe, which would be waited for."""
    if what == "a pipe":
        os.mkfifo("x.tar")
    said = t2i("data", *job.split()).sentence
    assert re.search(rf"x\.tar.*({reason})\.", said), said
