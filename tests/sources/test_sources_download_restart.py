"""A download that is killed or stopped leaves complete shards only, and goes on from them to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from picture_server import Server, downloaded, files, read, table_of

from t2i.errors import DataError


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def test_after_a_kill_it_goes_on_to_the_same_bytes(server, tmp_path):
    paths = [*(f"ok/{i}" for i in range(12)), "status/404", *(f"wait/{i}" for i in range(13, 20))]
    table, out = table_of(server, tmp_path, paths, n=range(20)), tmp_path / "out"
    command = [sys.executable, "-m", "t2i_cli.main", "data", "download", str(table), str(out)]
    options = ["--samples-per-shard", "5", "--timeout-s", "60", "--connections", "8"]
    options.append("--allow-private-addresses")
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("[!.]*.tar"))) < 2 and time.monotonic() < deadline:  # in either order
        time.sleep(0.02)
    children = child_processes(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in out.glob("[!.]*")) == [
        f"0000{i}{end}" for i in (0, 1) for end in (".parquet", ".tar", "_stats.json")
    ]
    assert len(read(out)) == 10
    server.released.set()
    server.calls.clear()
    report = downloaded(table, out, samples_per_shard=5)
    assert (report.shards, report.skipped, report.statuses) == (4, 2, {"success": 19, "http_404": 1})
    assert server.calls.keys() == set(paths[10:])  # nothing again
    downloaded(table, tmp_path / "whole", samples_per_shard=5)
    assert files(out) == files(tmp_path / "whole")
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children
    assert not any(map(alive, children))  # those that decode end with their parent


def child_processes(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_leaves_complete_shards_and_says_how_to_go_on(server, tmp_path):
    table = table_of(server, tmp_path, [*(f"ok/{i}" for i in range(4)), "wait/5"])
    out = tmp_path / "out"
    command = [sys.executable, "-m", "t2i_cli.main", "data", "download", str(table), str(out)]
    process = subprocess.Popen(
        [*command, "--samples-per-shard", "2", "--timeout-s", "60", "--allow-private-addresses"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "00001.tar").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all its processes
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "4 of 4 pictures packed in 2 shards" in said
    assert "the same command goes on after them" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]


def test_ctrl_c_while_the_decoders_start_is_as_quiet(server, tmp_path):
    command = [sys.executable, "-m", "t2i_cli.main", "data", "download"]
    process = subprocess.Popen(
        [
            *command,
            str(table_of(server, tmp_path, ["ok/1", "wait/2"])),
            str(tmp_path / "out"),
            "--allow-private-addresses",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60

    def decoder_starts():
        lines = [Path(f"/proc/{child}/cmdline") for child in child_processes(process.pid)]
        return any(b"spawn_main" in line.read_bytes() for line in lines if line.exists())

    while not decoder_starts() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # it imports
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "the same command goes on after them" in said


def test_another_table_or_size_is_refused(server, tmp_path):
    out = tmp_path / "out"
    downloaded(table_of(server, tmp_path, ["ok/1", "ok/2"]), out, samples_per_shard=1)
    before = files(out)
    words = r"00001\.tar was not downloaded from these rows with these options"
    with pytest.raises(DataError, match=words):
        downloaded(table_of(server, tmp_path, ["ok/1", "ok/3"]), out, samples_per_shard=1)
    with pytest.raises(DataError, match="was not downloaded from these rows"):
        downloaded(table_of(server, tmp_path, ["ok/1", "ok/2"]), out, samples_per_shard=1, image_size_px=8)
    with pytest.raises(DataError, match=r"00001\.tar is not of the table's rows, which fill 1 shard;"):
        downloaded(table_of(server, tmp_path, ["ok/1"]), out, samples_per_shard=1)
    assert files(out) == before
