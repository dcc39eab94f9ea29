"""Whatever lies beside a shard, or in a single sample: no crash; one sentence, or every loss counted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from data_configs import data_config
from data_samples import encode
from fuzz_shards import (
    HEADERS,
    LENGTH,
    PER_SHARD,
    SHARDS,
    SIZE_PX,
    TOTAL,
    WHOLE,
    count_bad,
    damage_of,
    delivered,
    epoch,
    fuzzing,
    key_of,
    lay_out,
    members_of,
)
from hypothesis import given
from hypothesis import strategies as st

from t2i.data.encoded import EMPTY_CAPTION, RECORD, Made, Preparation, Record, caption_hash
from t2i.data.index import ShardIndex
from t2i.data.loader import build_loader
from t2i.data_config import DataConfig
from t2i.errors import DataError
from t2i.interfaces import Batch
from t2i_pipelines.selection import write_selection


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def sentence_or_samples(data: DataConfig, positions: int | None = None) -> list[Batch] | None:
    """What an epoch gives, or None where it was refused in one sentence."""
    try:
        return epoch(data, positions)
    except DataError as error:
        said = str(error)
    assert said.endswith(".")
    assert "\n" not in said
    return None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@fuzzing
@given(data=st.data(), name=st.sampled_from(["index.json", "00001_stats.json", "00001.index.npz"]))
def test_what_lies_beside_a_shard_may_be_anything(folder, data, name):
    whole = lay_out(folder, WHOLE[1], "index")
    (folder / "00001_stats.json").write_text(json.dumps({"successes": PER_SHARD}))
    if name != "index.json":
        (folder / "index.json").unlink()
    if name == "00001_stats.json":
        (folder / "00001.index.npz").unlink()
        (folder / "00001.tar").write_bytes(WHOLE[1][: HEADERS[10]])  # else nobody asks
    content = (folder / name).read_bytes()
    made = damage_of(content)
    if name == "index.json":
        made |= json_values.map(lambda v: json.dumps({"shards": {"00001.tar": v}}).encode())
        entry = st.fixed_dictionaries({"samples": json_values, "bytes": st.just(LENGTH)})
        made |= entry.map(lambda v: json.dumps({"shards": {"00001.tar": v}}).encode())
    if name == "00001_stats.json":
        made |= json_values.map(lambda v: json.dumps({"successes": v}).encode())
        made |= json_values.map(lambda v: json.dumps(v).encode())
    (folder / name).write_bytes(data.draw(made))
    batches = sentence_or_samples(whole, TOTAL)
    if batches is not None and name == "00001.index.npz":
        bad = count_bad(batches)
        assert len(set(range(TOTAL)) - delivered(batches)) <= bad


@fuzzing
@given(data=st.data())
def test_an_index_with_other_numbers_gives_no_wrong_sample(folder, data):
    """An index whose file is whole, but not of this shard."""
    whole = lay_out(folder, WHOLE[1], "")
    index = ShardIndex.scan(folder / "00001.tar")
    offsets, sizes = index.offsets.copy(), index.sizes.copy()
    numbers = st.integers(-(2**62), 2**62) | st.integers(-1, LENGTH)
    for array in (offsets, sizes):
        for _ in range(data.draw(st.integers(0, 3))):
            array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(numbers)
    flaws = data.draw(st.dictionaries(st.integers(-2, 8), st.sampled_from(["truncated", "x"]), max_size=1))
    sizes_px = data.draw(
        st.none() | st.just(np.zeros((2, 2), np.int32)) | st.just(np.zeros((6, 2), np.int32))
    )
    forged = ShardIndex(index.keys, index.extensions, offsets, sizes, flaws, LENGTH, sizes_px)
    (folder / "00001.index.npz").write_bytes(forged.to_bytes())
    batches = epoch(whole)
    bad = count_bad(batches)
    assert len(set(range(TOTAL)) - delivered(batches)) <= bad


@fuzzing
@given(data=st.data())
def test_a_selection_may_be_anything(folder, data):
    whole = lay_out(folder, WHOLE[1], "")
    urls = [str(folder / f"{shard:05d}.tar") for shard in range(SHARDS)]
    keys = [pa.array([key_of(PER_SHARD * shard + i) for i in range(PER_SHARD)]) for shard in range(SHARDS)]
    write_selection(folder / "kept.arrow", urls, keys)
    content = (folder / "kept.arrow").read_bytes()
    (folder / "kept.arrow").write_bytes(data.draw(damage_of(content)))
    del whole
    sentence_or_samples(data_config(shards=str(folder / "kept.arrow"), max_bad_share=1.0), TOTAL)


CHANNELS, TOKENS, WIDTH = 4, 3, 5


def encoded_caption(caption: str) -> dict[str, torch.Tensor]:
    tensors = {"tokens": torch.ones(TOKENS, WIDTH).half(), "pooled": torch.ones(WIDTH).half()}
    tensors["mask"] = torch.ones(TOKENS, dtype=torch.uint8)
    return {f"{caption_hash(caption)}.{name}": tensor for name, tensor in tensors.items()}


def encoded_tensors(number: int) -> dict[str, torch.Tensor]:
    moments = torch.full((CHANNELS, SIZE_PX[0] // 2, SIZE_PX[1] // 2), float(number)).half()
    size = torch.tensor([*SIZE_PX, 0, 0])
    return {"moments": moments, "size": size} | encoded_caption(members_of(number)["txt"].decode())


@fuzzing
@given(data=st.data(), what=st.sampled_from(["shard", "member", RECORD, EMPTY_CAPTION]))
def test_an_encoded_shard_may_be_anything(folder, data, what):
    whole = lay_out(folder, WHOLE[1], "")
    encoded = folder / "encoded"
    (encoded / folder.name).mkdir(parents=True, exist_ok=True)
    features = {
        "latents": Made("image", ("moments",), "a", "a run"),
        "text": Made("caption", ("tokens", "pooled", "mask"), "t", "an encoder"),
    }
    record = Record(Preparation(SIZE_PX, None, 2.0), features, False, "float16")
    (encoded / RECORD).write_text(record.to_json())
    (encoded / EMPTY_CAPTION).write_bytes(safetensors.torch.save(encoded_caption("")))
    for shard in range(SHARDS):
        with tarfile.open(encoded / folder.name / f"{shard:05d}.tar", "w") as archive:
            for number in range(PER_SHARD * shard, PER_SHARD * (shard + 1)):
                content = safetensors.torch.save(encoded_tensors(number))
                if what == "member" and number == PER_SHARD + 2:
                    content = data.draw(damage_of(content))
                info = tarfile.TarInfo(f"{key_of(number)}.safetensors")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    path = {"shard": encoded / folder.name / "00001.tar"}.get(what, encoded / what)
    if what != "member":
        path.write_bytes(data.draw(damage_of(path.read_bytes())))
    config = data_config(**(whole.__dict__ | {"encoded": str(encoded)}))
    batches = sentence_or_samples(config, TOTAL)
    if batches is None:
        assert what in (RECORD, EMPTY_CAPTION)
        return
    good = set()
    for batch in batches:
        assert batch.features["moments"].shape == (1, CHANNELS, SIZE_PX[0] // 2, SIZE_PX[1] // 2)
        assert batch.features["tokens"].shape == (1, TOKENS, WIDTH)
        assert all(torch.isfinite(tensor).all() for tensor in batch.features.values())
        good.add(batch.metadata[0]["id"])
    assert TOTAL - len(good) <= count_bad(batches)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("json", b'{"original_height": 1' + b"0" * 30 + b', "original_width": 5}', None),
        ("json", b'{"original_height": true, "original_width": 1e400, "x": NaN}', None),
        ("json", b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}", "json"),
        ("txt", b"\0" * 300, None),
        ("txt", b"a" * 3_000_000, None),
        ("caption", b'{"caption": "\\ud800 half"}', "caption"),
        ("png", encode(np.zeros((1, 8_000_000), np.uint8)), "aspect"),
        ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_single_samples_that_are_strange(folder, name, content, cause, workers):
    """Also through a worker: what a batch holds has to be sent."""
    for path in folder.glob("0*"):
        path.unlink()
    samples = {number: members_of(number) for number in (0, 2, 4)}
    if name == "caption":
        samples[2] = {"png": samples[2]["png"], "json": content}
    else:
        samples[2] = samples[2] | {name: content}
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number, found in samples.items():
            for extension, data in found.items():
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    config = data_config(
        source=None, shards=str(folder / "0.tar"), max_bad_share=1.0, num_workers=workers, bucket_step_px=4
    )
    loader = build_loader(
        config, size_px=8, batch_size=3, text_dropout=0, min_original_px=1, seed=0, num_images=3
    )
    loader.timeout = 60 * workers  # else a batch that cannot be sent is waited for
    (batch,) = loader
    assert batch.bad == ({} if cause is None else {cause: 1})
