"""Memory of reading does not grow: not with time, nor with the size of shards."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from data_samples import good_members

MEASURE = """
import json, resource, sys
from t2i.data.loader import build_loader
from t2i.data_config import DataConfig

def now_mib():
    # Resident, and of that what is the process's own.
    with open("/proc/self/statm") as file:
        resident, shared = map(int, file.read().split()[1:3])
    return [pages * resource.getpagesize() / 2**20 for pages in (resident, resident - shared)]

url, segments, batches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
needed = dict(caption_keys=["txt"], filter_by_size=True, num_workers=0, cache_mib=0)
data = DataConfig(source=None, shards=url, shuffle_window_shards=segments, **needed)
loader = build_loader(
    data, size_px=8, batch_size=32, text_dropout=0, min_original_px=0, seed=0, num_images=32 * batches
)
seen = [now_mib()]
for batch in loader:
    seen.append(now_mib())
print(json.dumps(seen))
"""


def write(path: Path, count: int, extra: bytes = b"") -> None:
    members = good_members(0)
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            for extension, content in (members | ({"bin": extra} if extra else {})).items():
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def measured(url: str, segments: int, batches: int) -> tuple[list[float], list[float]]:
    """MiB of a process before reading and after each batch: resident, and of that its own. Pages of shards that are
    mapped are resident but not its own: they are the system's cache, shared, and go when anybody needs memory."""
    command = [sys.executable, "-c", MEASURE, url, str(segments), str(batches)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    resident, own = zip(*json.loads(output), strict=True)
    return list(resident), list(own)


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says it there")


@needs_proc
def test_an_epoch_over_many_shards_stays_flat(tmp_path):
    """64 shards of 100, of which 4 times 4 stay open."""
    write(tmp_path / "00000.tar", 100)
    for shard in range(1, 64):
        shutil.copy(tmp_path / "00000.tar", tmp_path / f"{shard:05d}.tar")
    for seen in measured(f"{tmp_path}/{{00000..00063}}.tar", 4, 200):
        half = len(seen) // 2
        assert max(seen[half:]) - max(seen[20:half]) < 3  # a shard has 0.3 MiB


@needs_proc
def test_memory_does_not_grow_with_the_size_of_a_shard(tmp_path):
    """Nor with members that nobody asked for."""
    write(tmp_path / "small.tar", 64)
    write(tmp_path / "large.tar", 64, extra=bytes(1 << 20))  # 65 MiB
    rises = []
    for name in ("small", "large"):
        _, (before, *own) = measured(str(tmp_path / f"{name}.tar"), 1, 4)
        rises.append(max(own) - before)
    assert rises[1] - rises[0] < 16
