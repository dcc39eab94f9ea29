"""Three small shards to damage, and what an epoch over them gives."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from data_configs import data_config
from data_samples import encode
from hypothesis import HealthCheck, reject, settings
from hypothesis import strategies as st

from t2i.data.index import ShardIndex
from t2i.data.loader import build_loader
from t2i.data_config import DataConfig
from t2i.errors import DataError
from t2i.interfaces import Batch

SHARDS, PER_SHARD = 3, 6
TOTAL = SHARDS * PER_SHARD
SIZE_PX = (8, 8)
DEADLINE_S = 20.0  # of one epoch of 18 tiny samples, on a machine that does other things, too


def picture(number: int) -> np.ndarray:
    """Flat, so that a JPEG keeps it: a colour of its own for each sample."""
    colour = (14 * number, 255 - 14 * number, (97 * number) % 256)
    return np.full((*SIZE_PX, 3), colour, dtype=np.uint8)


def members_of(number: int) -> dict[str, bytes]:
    metadata = {"id": number, "key": f"{number:09d}", "original_width": 80, "original_height": 80}
    as_jpeg = {"jpg": encode(picture(number), "JPEG", quality=95)}
    image = as_jpeg if number % 2 else {"png": encode(picture(number))}
    return image | {
        "txt": f"the sample with the number {number}".encode(),
        "json": json.dumps(metadata).encode(),
    }


def key_of(number: int) -> str:
    return f"{number // PER_SHARD:05d}{number % PER_SHARD:04d}"


def shard_bytes(numbers: range) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in numbers:
            for extension, content in members_of(number).items():
                info = tarfile.TarInfo(f"{key_of(number)}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


WHOLE = [shard_bytes(range(PER_SHARD * shard, PER_SHARD * (shard + 1))) for shard in range(SHARDS)]
LENGTH = len(WHOLE[1])
END = 512 * -(-len(WHOLE[1].rstrip(b"\0")) // 512)  # of the last member
with tarfile.open(fileobj=io.BytesIO(WHOLE[1])) as _archive:
    MEMBERS = _archive.getmembers()
HEADERS = [member.offset for member in MEMBERS]


def lay_out(folder: Path, damaged: bytes, beside: str) -> DataConfig:
    """beside: "stats", "index" (made before the damage) or "" """
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    for shard, content in enumerate(WHOLE):
        path = folder / f"{shard:05d}.tar"
        path.write_bytes(content)
        if beside == "stats":
            path.with_name(f"{shard:05d}_stats.json").write_text(json.dumps({"successes": PER_SHARD}))
        if beside == "index":
            path.with_name(f"{shard:05d}.index.npz").write_bytes(ShardIndex.scan(path).to_bytes())
    if beside == "index":
        entries = {f"{s:05d}.tar": {"samples": PER_SHARD, "bytes": len(c)} for s, c in enumerate(WHOLE)}
        entries["00001.tar"]["bytes"] = len(damaged)  # the size of the file is no help
        (folder / "index.json").write_text(json.dumps({"version": 1, "shards": entries}))
    (folder / "00001.tar").write_bytes(damaged)
    return data_config(shards=f"{folder}/{{00000..00002}}.tar", max_bad_share=1.0)


def epoch(data: DataConfig, positions: int | None = None) -> list[Batch]:
    """The batches of an epoch, one sample each: nothing is seen of the next."""
    began = time.monotonic()
    loader = build_loader(data, size_px=SIZE_PX, batch_size=1, text_dropout=0, min_original_px=0, seed=3)
    batches = list(itertools.islice(loader, positions or len(loader.dataset)))
    assert time.monotonic() - began < DEADLINE_S
    return batches


def epoch_or_refusal(data: DataConfig) -> list[Batch]:
    """The batches of an epoch; none, where it was refused as no sample of a segment can be read: hypothesis goes on
    with other damage."""
    try:
        return epoch(data)
    except DataError as error:
        if "a bad sample cannot be replaced" not in str(error):
            raise
        reject()


def count_bad(batches: list[Batch]) -> int:
    return sum(sum(batch.bad.values()) for batch in batches)


def delivered(batches: list[Batch]) -> set[int]:
    """The samples that came with their own pixels and their own caption."""
    found = set()
    for batch in batches:
        assert batch.image.shape == (1, 3, *SIZE_PX)
        assert torch.isfinite(batch.image).all()
        assert len(batch.caption) == len(batch.key) == len(batch.metadata) == 1
        assert batch.original_size.shape == batch.crop.shape == (1, 2)
        pixels = ((batch.image[0] + 1) * 127.5).permute(1, 2, 0).numpy()
        for number in range(TOTAL):
            same = batch.caption[0] == f"the sample with the number {number}"
            if same and np.abs(pixels - picture(number)).max() <= 3:
                found.add(number)
    return found


def touched(damaged: bytes, headers: bool) -> set[int]:
    """Samples of shard 1 of which a byte of the picture, the caption or the JSON is not what it was, or not there.
    headers: or of their headers"""
    found = set()
    for member in MEMBERS:
        here = slice(member.offset if headers else member.offset_data, member.offset_data + member.size)
        if damaged[here] != WHOLE[1][here]:
            found.add(PER_SHARD + int(member.name[5:9]))
    return found


def lost_and_noticed(batches: list[Batch], damaged: bytes) -> set[int]:
    """Samples that did not come, less those that came with bytes of their own changed, as no decoder can notice."""
    lost = set(range(TOTAL)) - delivered(batches)
    assert lost <= set(range(PER_SHARD, 2 * PER_SHARD))  # the other shards are not touched
    keys = {batch.key[0] for batch in batches}
    return {number for number in lost if key_of(number) not in keys or number not in touched(damaged, False)}


def flip(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def overwrite(content: bytes, at: int, by: bytes) -> bytes:
    return content[:at] + by + content[at + len(by) :]


def cut_out(content: bytes, at: int, size: int) -> bytes:
    return content[:at] + content[at + size :]


def damage_of(content: bytes) -> st.SearchStrategy[bytes]:
    at = st.integers(0, len(content) - 1)
    return st.one_of(
        st.builds(flip, st.just(content), at, st.integers(0, 7)),
        st.builds(overwrite, st.just(content), at, st.binary(min_size=1, max_size=40)),
        st.builds(lambda a: content[:a], at),
        st.builds(lambda a, by: content[:a] + by + content[a:], at, st.binary(min_size=1, max_size=40)),
        st.binary(max_size=200),
    )


EXAMPLES = 15
fuzzing = settings(
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
