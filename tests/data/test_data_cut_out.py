"""Bytes that were cut out of a tar file so that its headers stand at multiples of 512 again."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_shards import END, MEMBERS, PER_SHARD, WHOLE, cut_out

from t2i.data.index import ShardIndex
from t2i.data.tar import BLOCK

SAMPLE = MEMBERS[3].offset  # of the first one, in bytes


def scan(path: Path, content: bytes) -> ShardIndex:
    path.write_bytes(content)
    return ShardIndex.scan(path)


def filled(content: bytes, *members: int) -> bytes:
    """Something else than zeros behind the data of these members."""
    found = bytearray(content)
    for member in (MEMBERS[number] for number in members):
        end = member.offset_data + member.size
        found[end : end - end % BLOCK + BLOCK] = b"x" * (BLOCK - end % BLOCK)
    return bytes(found)


@pytest.mark.parametrize("member", [0, 4, 17])
def test_what_stands_behind_the_data_of_one_member_counts_and_loses_nothing(member, tmp_path):
    index = scan(tmp_path / "0.tar", filled(WHOLE[1], member))
    assert sorted(index.flaws) == [PER_SHARD]  # a stand-in
    assert (index.offsets[:PER_SHARD] >= 0).sum() == len(MEMBERS)


def test_a_writer_that_leaves_anything_behind_its_members_has_lost_nothing(tmp_path):
    index = scan(tmp_path / "0.tar", filled(WHOLE[1], *range(len(MEMBERS))))
    assert (len(index), index.flaws) == (PER_SHARD, {})


def test_a_file_that_is_no_whole_record_any_more_counts(tmp_path):
    index = scan(tmp_path / "0.tar", cut_out(WHOLE[1], 0, SAMPLE))
    assert (len(index), len(index.flaws)) == (PER_SHARD, 1)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8, 16])
def test_records_of_another_size_and_none_at_all_are_whole(blocks, tmp_path):
    record, length = blocks * BLOCK, END + 2 * BLOCK
    content = WHOLE[1][:END].ljust(-(-length // record) * record, b"\0")
    index = scan(tmp_path / "0.tar", content)
    assert (len(index), index.flaws) == (PER_SHARD, {})
