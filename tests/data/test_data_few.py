"""Of what may come a million times a few are named and the rest are counted."""

from __future__ import annotations

import logging
import pickle

import pytest
from data_configs import data_config
from data_samples import good_members
from open_shards import opened, take

from t2i.data.reader import read_all
from t2i.data.shards import SCANNING
from t2i.few import FEW, FewOfEach, first_few, plural
from t2i_cli.data import index as index_command
from t2i_cli.data import inspect as inspect_command


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def many_bad(write_tar):
    """1,500 samples without a picture, as many without a caption, and 200 good ones."""
    samples = {f"{i:04d}": {"txt": b"x"} for i in range(1500)}
    samples |= {f"{i:04d}": {"png": good_members(0)["png"]} for i in range(1500, 3000)}
    return write_tar("s.tar", samples | {f"{i:04d}": good_members(i) for i in range(3000, 3200)})


def skipped(caplog) -> list[str]:
    return [line for line in caplog.messages if line.startswith("skipped")]


def test_training_names_a_few_bad_samples_of_each_cause_and_counts_the_rest(many_bad, caplog):
    data = data_config(shards=str(many_bad), max_bad_share=1.0)
    with caplog.at_level(logging.WARNING, logger="t2i.data"):
        batches = take(data, 3200 // 8, batch_size=8, size_px=(8, 8))
    assert sum(sum(batch.bad.values()) for batch in batches) == 3000  # none is lost from the count
    lines = skipped(caplog)
    for cause in ("image", "caption"):
        named = [line for line in lines if f": {cause}: " in line]
        assert len(named) == len(set(named)) == FEW
        assert [line for line in lines if line.startswith(f"skipped {cause}: ")] == [
            f"skipped {cause}: {count} by now, of which the first {FEW} were named"
            for count in ("100", "1,000")
        ]
    assert len(lines) == 2 * (FEW + 2)


def test_so_does_reading_in_order(many_bad, caplog):
    with caplog.at_level(logging.WARNING, logger="t2i.data"):
        batch = read_all(data_config(shards=str(many_bad)), None, 8, 10)
    assert sum(batch.bad.values()) == 3000
    assert len(skipped(caplog)) == 2 * (FEW + 2)


def test_so_does_a_start_over_shards_that_are_gone(shard, tmp_path, caplog):
    shards = opened(
        [shard(0, 3), *(tmp_path / f"{number:05d}.tar" for number in range(1, 150))], max_bad_share=1.0
    )
    assert shards.sizes.sum() == 3 + 149
    gone = [message for message in caplog.messages if message != SCANNING]  # said of the one that is there
    assert len(gone) == FEW + 1


def test_commands_name_a_few_shards(tmp_path, shard, capsys):
    good = shard(0, 3)
    for number in range(1, 40):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"x" * 2000)
    index_command.run(
        [str(good), *(str(tmp_path / f"{n:05d}.tar") for n in range(1, 40)), "--processes", "1"]
    )
    said = capsys.readouterr().out
    assert said.count("Not indexed") == FEW
    assert f"... and {39 - FEW} more" in said
    inspect_command.run(
        [
            str(good),
            *(str(tmp_path / f"{n:05d}.tar") for n in range(1, 40)),
        ]
    )
    said = capsys.readouterr().out
    assert said.count("Unreadable shard") == FEW
    assert f"... and {39 - FEW} more" in said


def test_first_few():
    assert list(first_few(["a"] * FEW)) == ["a"] * FEW
    assert list(first_few([])) == []
    assert list(first_few([str(i) for i in range(FEW + 1234)]))[FEW:] == ["... and 1,234 more"]


def test_a_number_and_its_noun():
    assert [plural(count, "shard") for count in (0, 1, 2, 1234)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "1,234 shards",
    ]
    assert [plural(count, "shard is", "shards are") for count in (1, 2)] == ["1 shard is", "2 shards are"]


def test_each_message_counts_once_and_it_travels_to_other_processes(caplog):
    say = pickle.loads(pickle.dumps(FewOfEach(logging.getLogger("t2i.data"))))
    for _ in range(3):
        say(logging.WARNING, "kind", "the same")
    assert caplog.messages == ["the same"]
