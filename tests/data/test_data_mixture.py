"""Loaders over several datasets, in buckets, with several captions: what comes when, whoever asks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_configs import data_config
from data_samples import encode, noise

from t2i.data.buckets import assign, bucket_shapes
from t2i.data.loader import BatchLoader, build_loader
from t2i.data.order import MixtureOrder
from t2i.data_config import DataConfig, MixturePart
from t2i.interfaces import Batch

SIZES = {"a": (7, 5, 6), "b": (4, 5)}
SIDES_PX = ((12, 12), (8, 20), (20, 8), (12, 16))


@pytest.fixture
def shards(write_tar, tmp_path) -> dict[str, str]:
    """The shards of the parts a and b, which have keys in common; a sample's JSON says its part and number."""
    found = {}
    for part, sizes in SIZES.items():
        (tmp_path / part).mkdir()
        number = 0
        for shard, size in enumerate(sizes):
            samples = {}
            for row in range(size):
                height, width = SIDES_PX[number % len(SIDES_PX)]
                metadata = {
                    "part": part,
                    "id": number,
                    "long": f"a long caption of {part}{number}",
                    "tags": [f"tag {i}" for i in range(2)],
                    "original_height": 10 * height,
                    "original_width": 10 * width,
                }
                samples[f"{shard:05d}{row:04d}"] = {
                    "png": encode(noise(1000 * ord(part) + number, height, width)),
                    "txt": f"{part}{number}".encode(),
                    "json": json.dumps(metadata).encode(),
                }
                number += 1
            write_tar(f"{part}/{shard:05d}.tar", samples)
        found[part] = f"{tmp_path}/{part}/{{00000..{len(sizes) - 1:05d}}}.tar"
    return found


def mixed(shards: dict[str, str], parts: dict[str, dict] | None = None, **options) -> DataConfig:
    parts = parts or {}
    mixture = {name: MixturePart(shards=url, **parts.get(name, {})) for name, url in shards.items()}
    return data_config(shards=None, mixture=mixture, **{"shuffle_window_shards": 4} | options)


def loader(data: DataConfig, batches: int, **options) -> BatchLoader:
    loading = {"size_px": 8, "batch_size": 4, "text_dropout": 0.0, "min_original_px": 0, "seed": 4} | options
    images = batches * loading["batch_size"] * loading.get("world_size", 1)
    return build_loader(data, num_images=images, **loading)


def seen(batches: list[Batch]) -> list[tuple[str, int]]:
    return [(metadata["part"], metadata["id"]) for batch in batches for metadata in batch.metadata]


def test_parts_have_their_own_captions_sizes_crops_and_names(shards):
    parts = {
        "a": {"caption_keys": ["json:long"], "min_original_px": 100, "weight": 3.0},
        "b": {"caption_keys": ["json:missing", "txt"], "crop": "random", "horizontal_flip": True},
    }
    batches = list(loader(mixed(shards, parts), 100))
    crops = {"a": set(), "b": set()}
    for batch in batches:
        for key, caption, metadata, size, crop in zip(
            batch.key,
            batch.caption,
            batch.metadata,
            batch.original_size.tolist(),
            batch.crop.tolist(),
            strict=True,
        ):
            name = f"{metadata['part']}{metadata['id']}"
            assert key.startswith(f"{metadata['part']}:00")
            assert caption == (f"a long caption of {name}" if metadata["part"] == "a" else name)
            assert size == [metadata["original_height"], metadata["original_width"]]
            assert metadata["part"] == "b" or min(size) >= 100
            crops[metadata["part"]].add((metadata["id"], *crop))
    assert Counter(part for part, _ in seen(batches)) == pytest.approx({"a": 300, "b": 100}, abs=40)
    assert len({key for batch in batches for key in batch.key}) == len(set(seen(batches)))
    assert len(crops["a"]) == len({number for number, *_ in crops["a"]})  # in the middle each time
    assert len(crops["b"]) > 2 * sum(SIZES["b"])


@pytest.mark.parametrize("step", [None, 4])
def test_epochs_are_counted_as_they_are_read(shards, step):
    made = loader(mixed(shards, {"a": {"weight": 2.0}}, bucket_step_px=step), 120)
    batches = list(made)
    for count in (10, 55, 120):
        for part in made.dataset.stream.parts:
            came = sum(1 for name, _ in seen(batches[:count]) if name == part.name)
            assert came == round(made.epochs(4 * count)[part.name] * len(part.order))


@pytest.mark.parametrize("step", [None, 4])
def test_after_a_cycle_of_the_mixture_no_sample_is_ahead_of_another(shards, step):
    cycle = (
        MixtureOrder.CYCLE * 4 * (4 if step else 1)
    )  # positions: 4 columns of runs of one batch, or of one sample
    made = loader(mixed(shards, {"a": {"weight": 2.0}}, bucket_step_px=step), cycle // 4)
    counts = [Counter(), Counter()]
    for slots in made.sampler:
        for part, index in zip(slots.part.tolist(), slots.index.tolist(), strict=True):
            counts[part][index] += 1
    for part, count in zip(made.dataset.stream.parts, counts, strict=True):
        epochs = int(made.epochs(cycle)[part.name])
        assert sorted(count) == list(range(sum(SIZES[part.name])))
        assert min(count.values()) >= epochs
        if step is None:  # else the first ones of an epoch also fill up its last batches
            assert max(count.values()) <= epochs + 1


@pytest.mark.parametrize("step", [None, 4])
def test_another_number_of_ranks_goes_on_where_the_others_stopped(shards, step):
    data = mixed(shards, {"b": {"weight": 2.0}}, bucket_step_px=step, crop="random")
    options = {"text_dropout": 0.3}
    whole = list(loader(data, 24, **options))
    worlds = ((1, 4), (2, 4), (4, 4)) if step else ((1, 4), (2, 2), (4, 1), (2, 4), (3, 4))
    done, rest = 0, []
    for world_size, batch_size in worlds:
        steps = 2
        ranks = [
            list(
                loader(
                    data,
                    steps,
                    **options,
                    batch_size=batch_size,
                    rank=r,
                    world_size=world_size,
                    start_images=done,
                )
            )
            for r in range(world_size)
        ]
        for per_rank in zip(*ranks, strict=True):
            if step:  # a batch stays whole
                rest += [
                    list(
                        zip(
                            b.key,
                            b.caption,
                            b.crop.tolist(),
                            b.image.sum(dim=(1, 2, 3)).tolist(),
                            strict=True,
                        )
                    )
                    for b in per_rank
                ]
            else:
                rows = [
                    list(
                        zip(
                            b.key,
                            b.caption,
                            b.crop.tolist(),
                            b.image.sum(dim=(1, 2, 3)).tolist(),
                            strict=True,
                        )
                    )
                    for b in per_rank
                ]
                rest += [[row[i] for i in range(batch_size) for row in rows]]
        done += steps * batch_size * world_size
    flat = [row for batch in rest for row in batch]
    wanted = [
        row
        for b in whole
        for row in zip(b.key, b.caption, b.crop.tolist(), b.image.sum(dim=(1, 2, 3)).tolist(), strict=True)
    ]
    assert len(flat) == done
    assert flat == wanted[:done]


@pytest.mark.parametrize("step", [None, 4])
def test_counted_by_hand_each_position_and_each_epoch_is_read_once_however_it_is_resumed(shards, step):
    """Through processes that read ahead. In a cycle of the mixture, 1,000 runs in each of two columns, a part has its
    share of the runs exactly."""
    weights, batch_size = {"a": 3, "b": 1}, 2
    captions = {"txt": 1.0, "json:tags": 2.0}
    data = mixed(shards, {name: {"weight": w} for name, w in weights.items()}, caption_keys=captions)
    data = replace(data, bucket_step_px=step, crop="random", shuffle_window_shards=2)
    total = 2 * 1000 * (1 if step is None else batch_size)
    # Processes, pictures of each at a time, readers and steps, of runs that are each stopped somewhere in an epoch.
    runs = [(1, 2, 0, 35), (2, 2, 1, 21), (1, 2, 2, 40)] + ([(3, 2, 0, 9)] if step else [(3, 5, 0, 8)])
    found: dict[int, tuple] = {}
    while len(found) < total:
        world, each, workers, steps = runs.pop(0) if runs else (1, 2, 0, (total - len(found)) // 2)
        done = len(found)
        options = {"batch_size": each, "world_size": world, "start_images": done, "text_dropout": 0.2}
        for rank in range(world):
            made = loader(replace(data, num_workers=workers), steps, rank=rank, **options)
            for number, batch in enumerate(made):
                first = done + number * each * world
                wanted = [
                    first + (i // batch_size * world + rank) * batch_size + i % batch_size
                    if step
                    else first + i * world + rank
                    for i in range(each)
                ]
                assert batch.position.tolist() == wanted
                shape = tuple(batch.image.shape[2:])
                rows = zip(
                    batch.position.tolist(), seen([batch]), batch.caption, batch.crop.tolist(), strict=True
                )
                for position, name, caption, crop in rows:
                    assert position not in found
                    found[position] = (*name, caption, *crop, shape)
    assert sorted(found) == list(range(total))
    begin = loader(data, 450 // batch_size, batch_size=batch_size, text_dropout=0.2)
    alone = [
        (*name, caption, *crop, tuple(batch.image.shape[2:]))
        for batch in begin
        for name, caption, crop in zip(seen([batch]), batch.caption, batch.crop.tolist(), strict=True)
    ]
    assert alone == [found[position] for position in range(len(alone))]
    for part, weight in weights.items():
        counts = Counter(number for name, number, *_ in found.values() if name == part)
        assert counts.total() == total * weight // 4
        shapes = {number: shape for name, number, *_, shape in found.values() if name == part}
        of_shape = Counter(shapes.values())
        filled = {shape: -(-many // batch_size) * batch_size for shape, many in of_shape.items()}
        epochs = counts.total() // (sum(filled.values()) if step else len(counts))
        assert sorted(counts) == list(range(sum(SIZES[part])))
        assert min(counts.values()) >= epochs
        if step is None:
            assert max(counts.values()) <= epochs + 1
        for shape, places in filled.items() if step else ():
            came = sum(counts[number] for number in counts if shapes[number] == shape)
            assert epochs * places <= came <= (epochs + 1) * places


def test_in_buckets_every_batch_has_one_shape_and_its_own_crops(shards):
    data = mixed(shards, bucket_step_px=4, crop="random")
    shapes = bucket_shapes(12, 4, data.max_aspect)
    shared = set()
    for batch in loader(data, 60, size_px=12):
        sizes = np.array([[m["original_height"], m["original_width"]] for m in batch.metadata])
        (bucket,) = set(assign(sizes, shapes).tolist())
        assert tuple(batch.image.shape) == (4, 3, *shapes[bucket])
        assert batch.original_size.tolist() == sizes.tolist()
        assert len({m["part"] for m in batch.metadata}) == 1
        shared.add(tuple(batch.image.shape))
        for (height, width), (top, left) in zip(sizes // 10, batch.crop.tolist(), strict=True):
            scale = max(shapes[bucket][0] / height, shapes[bucket][1] / width)
            assert 0 <= top <= round(height * scale) - shapes[bucket][0]
            assert 0 <= left <= round(width * scale) - shapes[bucket][1]
    assert len(shared) == 3


def test_captions_are_drawn_by_their_weights_and_always_the_same(shards):
    weights = {"txt": 5.0, "json:long": 3.0, "json:tags": 2.0}
    data = data_config(shards=shards["a"], caption_keys=weights)
    batches = list(loader(data, 90, batch_size=18))
    drawn = Counter()
    for batch in batches:
        for caption in batch.caption:
            kind = "long" if caption.startswith("a long") else caption if caption.startswith("tag") else "txt"
            drawn[kind] += 1
    total = 90 * 18
    wanted = {"txt": 0.5 * total, "long": 0.3 * total, "tag 0": 0.1 * total, "tag 1": 0.1 * total}
    chi_squared = sum((drawn[kind] - count) ** 2 / count for kind, count in wanted.items())
    assert chi_squared < 16.3  # 3 degrees of freedom: exceeded by chance once in 1,000
    by_sample: dict[int, set[str]] = {}
    for batch in batches:
        for metadata, caption in zip(batch.metadata, batch.caption, strict=True):
            by_sample.setdefault(metadata["id"], set()).add(caption)
    assert all(len(found) >= 3 for found in by_sample.values())  # not one and the same each epoch
    again = list(loader(data, 45, batch_size=18, start_images=45 * 18))
    assert [batch.caption for batch in again] == [batch.caption for batch in batches[45:]]
    other = list(loader(data, 45, batch_size=18, seed=9))
    assert [batch.caption for batch in other] != [batch.caption for batch in batches[:45]]


def test_dropped_captions_are_the_same_for_any_number_of_ranks_and_workers(shards):
    """As pairs of the epoch, by its number of positions, and the key."""

    def dropped(world_size: int, workers: int) -> set[tuple[int, str]]:
        data = data_config(shards=shards["a"], num_workers=workers)
        found = set()
        for rank in range(world_size):
            batch_size = 18 // world_size
            made = loader(
                data, 12, batch_size=batch_size, text_dropout=0.25, rank=rank, world_size=world_size
            )
            for epoch, batch in enumerate(made):
                found |= {(epoch, k) for k, c in zip(batch.key, batch.caption, strict=True) if c == ""}
        return found

    alone = dropped(1, 0)
    assert len(alone) == pytest.approx(0.25 * 12 * 18, abs=4 * (0.25 * 0.75 * 12 * 18) ** 0.5)
    assert dropped(3, 0) == dropped(2, 2) == alone


def test_the_same_dataset_twice_is_read_in_two_orders(shards):
    data = mixed({"x": shards["a"], "y": shards["a"]})
    ids = {"x": [], "y": []}
    for batch in loader(data, 40):
        for key, metadata in zip(batch.key, batch.metadata, strict=True):
            ids[key[0]].append(metadata["id"])
    first = {name: found[:18] for name, found in ids.items()}
    assert sorted(first["x"]) == list(range(18)) or len(set(first["x"])) > 12
    assert first["x"] != first["y"]


def test_a_bad_share_is_that_of_all_parts_and_names_the_part(shards, write_tar, tmp_path: Path):
    (tmp_path / "c").mkdir()
    write_tar(
        "c/00000.tar",
        {str(i): {"txt": b"no picture"} for i in range(3)}
        | {"x": {"png": encode(noise(0)), "txt": b"x", "json": b'{"part": "c", "id": 0}'}},
    )
    data = mixed({**shards, "c": str(tmp_path / "c" / "00000.tar")}, max_bad_share=0.4)
    batches = list(loader(data, 60))
    assert sum(batch.bad.get("image", 0) for batch in batches) == pytest.approx(0.75 * 80, abs=25)
    assert torch.isfinite(torch.stack([batch.image for batch in batches])).all()
