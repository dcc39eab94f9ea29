import dataclasses
import itertools
import json
import logging
import multiprocessing
import subprocess

import numpy as np
import pytest
import torch
from data_configs import data_config
from data_samples import encode, good_members, noise

from t2i.data.loader import build_loader
from t2i.data.order import ShardOrder
from t2i.data.reader import read_all
from t2i.data_config import DataConfig
from t2i.errors import DataError
from t2i.interfaces import Batch


def load(data: DataConfig, count: int, **options) -> list[Batch]:
    defaults = {"size_px": (8, 10), "batch_size": 4, "text_dropout": 0.3, "min_original_px": 0, "seed": 5}
    return list(itertools.islice(build_loader(data, **(defaults | options)), count))


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in ((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Batch))
    )


def ids(batches: list[Batch]) -> list[int]:
    return [metadata["id"] for batch in batches for metadata in batch.metadata]


RANDOM = {"crop": "random", "horizontal_flip": True}


def test_a_batch_is_what_its_record_promises(make_data):
    (batch,) = load(make_data([3, 4]), 1, text_dropout=0.0)
    assert batch.image.shape == (4, 3, 8, 10)
    assert batch.image.dtype == torch.float32
    assert batch.caption == [f"sample {m['id']}" for m in batch.metadata]
    assert len(set(batch.key)) == 4
    assert batch.original_size.dtype == batch.crop.dtype == torch.int64
    assert batch.original_size.tolist() == [[120, 160]] * 4  # as the JSON says; the picture is a tenth of it
    assert batch.crop.tolist() == [[0, 0]] * 4
    assert batch.bad == {}
    assert same(batch.to("cpu"), batch)


def test_pixels_are_those_of_the_picture(make_data):
    (batch,) = load(make_data([4]), 1, size_px=(12, 16))
    for image, metadata in zip(batch.image, batch.metadata, strict=True):
        pixels = ((image + 1) * 127.5).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(pixels, noise(metadata["id"]), atol=1e-4)
    assert batch.image.min() >= -1
    assert batch.image.max() <= 1


def test_samples_come_in_the_order_of_the_pure_function(make_data):
    data = make_data([3, 4, 2], shuffle_window_shards=2)
    assert ids(load(data, 9)) == ShardOrder([3, 4, 2], 5, 2).locate(range(36))[1].tolist()


@pytest.mark.parametrize("options", [{}, RANDOM, {"cache_mib": 1}])
def test_workers_do_not_change_anything(make_data, options):
    data = make_data([5, 4], **options)
    alone = load(data, 6)
    for workers in (1, 2):
        batches = load(dataclasses.replace(data, num_workers=workers), 6)
        assert all(same(a, b) for a, b in zip(alone, batches, strict=True))


def test_a_signal_to_all_processes_of_a_run_ends_no_worker(make_data):
    """As clusters and terminals send it: the process that trains decides, and may need the next batch to end a step."""
    data = make_data([5, 4], num_workers=2)
    whole = load(data, 8)
    batches = iter(
        build_loader(data, size_px=(8, 10), batch_size=4, text_dropout=0.3, min_original_px=0, seed=5)
    )
    assert all(same(next(batches), batch) for batch in whole[:2])  # one from each: both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for name in ("INT", "TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert all(same(next(batches), batch) for batch in whole[2:])
    for worker in workers:
        worker.terminate()  # their own parent
        worker.join(20)
        assert worker.exitcode == 0


@pytest.mark.parametrize("options", [{}, RANDOM])
@pytest.mark.parametrize("start", [4, 8, 24])
def test_a_resumed_stream_is_the_uninterrupted_one(make_data, options, start):
    data = make_data([5, 4], **options)
    whole = load(data, 9)
    rest = load(data, 9 - start // 4, start_images=start)
    assert all(same(a, b) for a, b in zip(whole[start // 4 :], rest, strict=True))


def test_another_number_of_ranks_goes_on_where_the_others_stopped(make_data):
    data = make_data([7, 6], **RANDOM)
    one = load(data, 6, batch_size=12)
    start = 24
    for world_size, batch_size in [(2, 6), (3, 4), (4, 3)]:
        ranks = [
            load(data, 4, batch_size=batch_size, rank=rank, world_size=world_size, start_images=start)
            for rank in range(world_size)
        ]
        for wanted, parts in zip(one[2:], zip(*ranks, strict=True), strict=True):
            for rank, part in enumerate(parts):
                assert torch.equal(wanted.image[rank::world_size], part.image)
                assert wanted.caption[rank::world_size] == part.caption
                assert torch.equal(wanted.crop[rank::world_size], part.crop)


def test_a_start_need_not_be_a_multiple_of_the_batch(make_data):
    data = make_data([7])
    assert ids(load(data, 3, start_images=5)) == ids(load(data, 17, batch_size=1))[5:]


def test_num_images_ends_the_stream(make_data):
    data = make_data([7])
    loader = build_loader(
        data, size_px=8, batch_size=2, text_dropout=0, min_original_px=0, seed=0, world_size=2, num_images=9
    )
    assert len(loader) == 3
    assert len(list(loader)) == 3


def test_crops_and_flips_are_random_but_fixed_by_seed_epoch_and_sample(make_data):
    data = make_data([4], **RANDOM)
    epochs = load(data, 8, size_px=(8, 8))
    assert len({str(crop) for batch in epochs for crop in batch.crop.tolist()}) > 1
    assert {crop[0] for batch in epochs for crop in batch.crop.tolist()} == {0}
    plain = load(dataclasses.replace(data, horizontal_flip=False), 8, size_px=(8, 8))
    flips = [
        torch.equal(a, b.flip(-1))
        for x, y in zip(epochs, plain, strict=True)
        for a, b in zip(x.image, y.image, strict=True)
    ]
    assert 0 < sum(flips) < 32
    other = load(data, 8, size_px=(8, 8), seed=6)
    assert not all(same(a, b) for a, b in zip(epochs, other, strict=True))


def test_dropout_is_as_often_as_configured_and_does_not_depend_on_the_past(make_data):
    data = make_data([50], cache_mib=1)
    captions = [c for batch in load(data, 40, batch_size=50, text_dropout=0.1) for c in batch.caption]
    assert abs(captions.count("") - 200) < 4 * np.sqrt(2000 * 0.1 * 0.9)
    later = load(data, 1, batch_size=50, text_dropout=0.1, start_images=1950)
    assert later[0].caption == captions[1950:]


def test_the_cache_does_not_change_anything_and_decodes_once(make_data, monkeypatch):
    import t2i.data.reader as reader

    decoded = []
    decode_image = reader.decode_image
    monkeypatch.setattr(reader, "decode_image", lambda *a: decoded.append(a[1]) or decode_image(*a))
    data = make_data([6])
    plain = load(data, 6)
    assert len(decoded) == 24
    decoded.clear()
    cached = load(dataclasses.replace(data, cache_mib=1), 6)
    assert all(same(a, b) for a, b in zip(plain, cached, strict=True))
    assert len(decoded) == len(set(decoded)) == 6


def test_the_cache_stays_within_its_size(make_data):
    data = make_data([10], cache_mib=1)
    loader = build_loader(data, size_px=256, batch_size=10, text_dropout=0, min_original_px=0, seed=0)
    next(iter(loader))
    cached = loader.dataset.stream.parts[0].reader._cache.values()
    assert sum(sample.picture.numel() for sample in cached) <= 2**20 < 6 * 3 * 256 * 256


BAD = {
    "corrupt": ({"jpg": encode(noise(0, 64, 64), "JPEG")[:500], "txt": b"x"}, "image"),
    "empty": ({"jpg": b"", "txt": b"x"}, "image"),
    "without": ({"txt": b"x", "json": b"{}"}, "image"),
    "silent": ({"png": encode(noise(0))}, "caption"),
    "latin": ({"png": encode(noise(0)), "txt": b"\xe9"}, "caption"),
    "brace": ({"png": encode(noise(0)), "txt": b"x", "json": b"{"}, "json"),
    "bomb": ({"png": encode(np.zeros((10_000, 10_000), np.uint8)), "txt": b"x"}, "bomb"),
}


@pytest.fixture
def data_with_bad_samples(write_tar, tmp_path) -> DataConfig:
    samples = {f"good{i}": good_members(i) for i in range(20)}
    samples |= {key: members for key, (members, _) in BAD.items()}
    write_tar("00000.tar", samples)
    cut = write_tar("00001.tar", {f"cut{i}": good_members(100 + i) for i in range(3)})
    cut.write_bytes(cut.read_bytes()[:-12_000])
    write_tar("00002.tar", {}).write_bytes(b"")
    return data_config(shards=f"{tmp_path}/{{00000..00002}}.tar", max_bad_share=1.0)


def all_causes() -> dict[str, int]:
    causes = [cause for _, cause in BAD.values()] + ["truncated", "truncated"]
    return {cause: causes.count(cause) for cause in causes}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_by_cause_and_skipped(data_with_bad_samples, workers):
    size = 20 + len(BAD) + 3 + 1
    data = dataclasses.replace(data_with_bad_samples, num_workers=workers)
    (epoch,) = load(data, 1, batch_size=size, text_dropout=0)
    assert len(epoch) == size
    assert epoch.bad == all_causes()
    good = {f"sample {i}" for i in range(20)} | {"sample 100", "sample 101"}
    assert set(epoch.caption) == good
    batches = load(data, 8, batch_size=4, text_dropout=0)
    assert all(batch.image.shape == (4, 3, 8, 10) for batch in batches)
    assert good <= {caption for batch in batches for caption in batch.caption}


def test_a_bad_samples_seat_goes_to_the_next_good_one_of_its_lane(data_with_bad_samples):
    data = dataclasses.replace(data_with_bad_samples, shuffle_window_shards=3)
    captions = [c for b in load(data, 31, batch_size=1, text_dropout=0) for c in b.caption]
    keys = [*(f"good{i}" for i in range(20)), *BAD, "cut0", "cut1", "cut2", "00002"]
    names = {f"good{i}": f"sample {i}" for i in range(20)} | {"cut0": "sample 100", "cut1": "sample 101"}
    order = ShardOrder([27, 3, 1], 5, 3)
    for position, caption in enumerate(captions):
        index = order.locate([position])[1].item()
        following = [index, *(sample for _, sample in order.substitutes(position))]
        assert caption == next(names[keys[i]] for i in following if keys[i] in names)


def test_a_bad_sample_is_logged_once_with_its_key(data_with_bad_samples, caplog):
    with caplog.at_level(logging.WARNING, logger="t2i.data"):
        load(data_with_bad_samples, 3, batch_size=31)
    lines = [record.getMessage() for record in caplog.records]
    for key, (_, cause) in BAD.items():
        assert sum(f"sample 00000:{key}: {cause}" in line for line in lines) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_with_one_sentence(data_with_bad_samples, workers):
    data = dataclasses.replace(data_with_bad_samples, max_bad_share=0.2, num_workers=workers)
    with pytest.raises(DataError) as error:
        load(data, 400)
    message = str(error.value)
    assert "data.max_bad_share=0.2" in message
    assert "image: " in message
    assert "truncated: " in message
    assert "Traceback" not in message


def test_few_bad_samples_are_no_reason_to_stop(write_tar):
    samples = {str(i): good_members(i) for i in range(200)} | {"x": {"txt": b"no picture"}}
    data = data_config(shards=str(write_tar("s.tar", samples)), max_bad_share=0.01)
    assert sum(sum(batch.bad.values()) for batch in load(data, 201, batch_size=2)) == 2  # once an epoch


def test_where_nothing_can_be_read_the_run_stops(write_tar):
    path = str(write_tar("s.tar", {str(i): {"txt": b"x"} for i in range(150)}))
    with pytest.raises(
        DataError, match=r"100 of 100 samples read are bad \(image: 100; the first: image \d+\)"
    ):
        load(data_config(shards=path), 1, batch_size=100)
    with pytest.raises(DataError, match="none of the samples that follow it can be read \\(image: 150\\)"):
        load(data_config(shards=path, max_bad_share=1.0), 1)
    with pytest.raises(DataError, match="none of 150 samples can be read"):
        read_all(data_config(shards=path), path, 8)


def test_small_samples_are_left_out_when_asked(write_tar, caplog):
    samples = {str(i): good_members(i, 10 + i, 40) for i in range(6)}  # the JSON says ten times that
    samples["6"] = good_members(6) | {"json": b'{"id": 6}'}  # 12 x 16 pixels
    samples["7"] = good_members(7) | {"json": b"{"}
    path = str(write_tar("s.tar", samples))
    data = data_config(shards=path, max_bad_share=1.0)
    kept = load(data, 1, batch_size=4, min_original_px=130)
    assert sorted(set(ids(kept))) == [3, 4, 5]
    assert kept[0].bad == {"json": 1}
    everything = load(dataclasses.replace(data, filter_by_size=False), 1, batch_size=8, min_original_px=130)
    assert len(set(ids(everything))) == 7


def test_where_every_sample_is_too_small_the_run_stops(make_data):
    with pytest.raises(
        DataError, match=r"none of 3 samples has min_original_px=.* 120 px.*filter_by_size=false"
    ):
        load(make_data([2, 1]), 1, min_original_px=121)


def test_keys_are_unique_even_where_shards_repeat_them(write_tar):
    paths = [str(write_tar(f"{i}.tar", {"0": good_members(i), "1": good_members(9 + i)})) for i in range(3)]
    (batch,) = load(data_config(shards=paths), 1, batch_size=6)
    assert len(set(batch.key)) == 6


def test_no_shards_is_said(make_data, write_tar):
    with pytest.raises(DataError, match=r"data\.shards is not set"):
        load(data_config(source="emoji", shards=None), 1)
    with pytest.raises(DataError, match="hold no samples"):
        load(data_config(shards=str(write_tar("s.tar", {}))), 1)


def test_one_of_several_captions_is_taken(write_tar):
    metadata = json.dumps({"id": 0, "captions": ["a", "b", "c"]}).encode()
    path = str(write_tar("s.tar", {"0": {"png": encode(noise(0)), "json": metadata}}))
    data = data_config(shards=path, caption_keys=["json:captions"])
    (batch,) = load(data, 1, batch_size=50, text_dropout=0)
    assert set(batch.caption) == {"a", "b", "c"}
    assert read_all(data, path, 8).caption == ["a"]


def test_read_all_goes_in_shard_order(make_data):
    data = make_data([3, 4], **RANDOM)
    batch = read_all(data, data.shards, 8)
    assert [m["id"] for m in batch.metadata] == list(range(7))
    assert batch.crop[:, 0].tolist() == [0] * 7
    assert [m["id"] for m in read_all(data, data.shards, 8, 5).metadata] == list(range(5))


def test_read_all_names_the_key_of_what_is_missing(make_data):
    data = make_data([1], heldout_shards="/no/such/shard.tar")
    with pytest.raises(
        DataError, match=r"data\.heldout_shards names /no/such/shard\.tar, which does not exist"
    ):
        read_all(data, data.heldout_shards, 8)


def test_bad_samples_do_not_count_towards_the_limit(data_with_bad_samples):
    shards = data_with_bad_samples.shards
    batch = read_all(data_with_bad_samples, shards, 8)
    assert len(batch) == 22
    assert batch.bad == all_causes()
    assert len(read_all(data_with_bad_samples, shards, 8, 21)) == 21


def test_every_sample_of_the_real_shards_is_read(shared_data):
    for folder, count in [("clipart/{00000..00004}", 2038), ("emoji/{00000..00002}", 1377)]:
        shards = f"{shared_data}/{folder}.tar"
        batch = read_all(data_config(shards=shards), shards, 64)
        assert len(batch) == len(set(batch.key)) == count
        assert batch.bad == {}
        assert batch.image.std() > 0.3
        assert all(len(m["caption"].strip()) > 0 for m in batch.metadata)
