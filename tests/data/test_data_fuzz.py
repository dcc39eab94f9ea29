"""Whatever the bytes: no crash, no hang, and every loss counted.

No checksum is promised: a flipped byte among the pixels, or in a caption, that leaves both readable gives a changed
sample. img2dataset's JSON has a `sha256`, but of the bytes as they were downloaded, before it resized and encoded them
again, so that it says nothing about what is in the shard. What a tar file protects are its headers.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fuzz_shards import (
    END,
    EXAMPLES,
    HEADERS,
    LENGTH,
    MEMBERS,
    PER_SHARD,
    TOTAL,
    WHOLE,
    count_bad,
    cut_out,
    delivered,
    epoch,
    epoch_or_refusal,
    flip,
    fuzzing,
    key_of,
    lay_out,
    lost_and_noticed,
    members_of,
    overwrite,
    picture,
    touched,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


places = st.integers(0, END - 1) | st.sampled_from(HEADERS) | st.sampled_from(HEADERS).map(lambda h: h + 124)
blocks = st.integers(0, END // 512 - 1).map(lambda block: 512 * block)
lengths = st.integers(1, 40) | st.integers(1, 20).map(lambda n: 512 * n)


same_length = st.one_of(
    st.builds(flip, st.just(WHOLE[1]), places, st.integers(0, 7)),
    st.builds(overwrite, st.just(WHOLE[1]), places, st.binary(min_size=1, max_size=1500)),
    st.builds(overwrite, st.just(WHOLE[1]), blocks, lengths.map(bytes)),
).filter(lambda content: len(content) == LENGTH)
any_damage = st.one_of(
    same_length,
    st.builds(lambda at: WHOLE[1][:at], st.integers(0, END)),
    st.builds(
        lambda at, by: WHOLE[1][:at] + by + WHOLE[1][at:], places, st.binary(min_size=1, max_size=1500)
    ),
    st.builds(cut_out, st.just(WHOLE[1]), places, lengths),
)


@pytest.mark.parametrize("beside", ["stats", "index"])
@fuzzing
@given(damaged=any_damage)
def test_where_the_number_of_samples_is_known_every_loss_is_counted(folder, beside, damaged):
    batches = epoch_or_refusal(lay_out(folder, damaged, beside))
    assert len(lost_and_noticed(batches, damaged)) <= count_bad(batches)


def is_shorter_tar(damaged: bytes) -> bool:
    """Whether bytes were cut out so that what is left is a tar file, byte for byte as tarfile writes it of its members,
    or `tar --blocking-factor` with a power of two: only statistics, or an index, tell that there were more."""
    buffer = io.BytesIO()
    try:
        with (
            tarfile.open(fileobj=io.BytesIO(damaged)) as archive,
            tarfile.open(fileobj=buffer, mode="w") as written,
        ):
            for member in archive:
                written.addfile(member, archive.extractfile(member))
            end = written.offset
    except (tarfile.TarError, OSError):
        return False
    records = [tarfile.RECORDSIZE, *(512 << n for n in range(8))]
    lengths = [-(-(end + 1024) // record) * record for record in records]
    whole = buffer.getvalue()[:end] == damaged[:end] and not damaged[end:].strip(b"\0")
    return whole and len(damaged) < LENGTH and len(damaged) in lengths


@settings(fuzzing, max_examples=2 * EXAMPLES)
@given(damaged=any_damage)
@example(damaged=cut_out(WHOLE[1], 1177, 4608))  # a caption's header with the end of the next sample's JSON
@example(damaged=cut_out(WHOLE[1], 2048, 4608))  # a JSON and all of the next sample: the record is short
@example(
    damaged=cut_out(WHOLE[1], 2172, 10240)
)  # from one JSON's header to that of the third sample after it
@example(damaged=cut_out(WHOLE[1], HEADERS[3], 10240))  # what is left is a tar file: only that it is read
def test_where_it_is_not_known_at_least_the_damage_counts(folder, damaged):
    batches = epoch_or_refusal(lay_out(folder, damaged, ""))
    lost = lost_and_noticed(batches, damaged)
    assert min(1, len(lost)) <= count_bad(batches) or is_shorter_tar(damaged)


@settings(fuzzing, max_examples=2 * EXAMPLES)
@given(damaged=same_length)
@example(
    damaged=overwrite(WHOLE[1], HEADERS[3], bytes(HEADERS[6] - HEADERS[3]))
)  # the second sample is all zeros
@example(damaged=overwrite(WHOLE[1], HEADERS[15], bytes(END - HEADERS[15])))  # the last one is
@example(
    damaged=overwrite(WHOLE[1], HEADERS[5], b"?" * (HEADERS[9] - HEADERS[5]))
)  # a JSON and the sample behind it
def test_damage_of_one_place_loses_no_sample_that_it_does_not_touch(folder, damaged):
    batches = epoch_or_refusal(lay_out(folder, damaged, ""))
    assert set(range(TOTAL)) - delivered(batches) <= touched(damaged, True)
    assert min(1, len(lost_and_noticed(batches, damaged))) <= count_bad(batches)


def resigned(header: bytes) -> bytes:
    """With a checksum that is right: damage that tar does not see."""
    total = 256 + sum(header[:148]) + sum(header[156:512])
    return header[:148] + f"{total:06o}\0 ".encode() + header[156:]


@fuzzing
@given(
    member=st.integers(0, 3 * PER_SHARD - 1),
    field=st.sampled_from(["name", "size", "type"]),
    value=st.integers(0, 8**11 - 1) | st.integers(0, 4000),
    letters=st.text("0123456789.jpngtxso/", min_size=1, max_size=20),
)
@example(member=4, field="size", value=0, letters="0")
@example(member=0, field="size", value=8**11 - 1, letters="0")
@example(member=0, field="type", value=ord("x"), letters="0")
@example(member=0, field="type", value=ord("L"), letters="0")
@example(member=0, field="type", value=ord("S"), letters="0")
def test_forged_headers_lose_no_sample_uncounted(folder, member, field, value, letters):
    """Where the number of samples is known. Names that make one sample's member another's change both."""
    at = HEADERS[member]
    header = bytearray(WHOLE[1][at : at + 512])
    if field == "size":
        header[124:136] = f"{value:011o}\0".encode()
    elif field == "type":
        header[156] = value % 256
    else:
        header[: len(letters)] = letters.encode()
    damaged = overwrite(WHOLE[1], at, resigned(bytes(header)))
    for beside in ("stats", "index"):
        batches = epoch_or_refusal(lay_out(folder, damaged, beside))
        lost = set(range(TOTAL)) - delivered(batches)
        keys = {batch.key[0] for batch in batches}
        assert lost <= set(range(PER_SHARD, 2 * PER_SHARD))
        assert len([number for number in lost if key_of(number) not in keys]) <= count_bad(batches)


def apart() -> bytes:
    """The second shard with all pictures first, then all captions, then all JSON."""
    numbers = range(PER_SHARD, 2 * PER_SHARD)
    found = [(key_of(n), ending, content) for n in numbers for ending, content in members_of(n).items()]
    found.sort(key=lambda each: (each[1] == "json", each[1] == "txt"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, ending, content in found:
            info = tarfile.TarInfo(f"{key}.{ending}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


APART = apart()


@pytest.mark.parametrize("beside", ["stats", ""])
@fuzzing
@given(
    damaged=st.one_of(
        st.builds(overwrite, st.just(APART), places, st.binary(min_size=1, max_size=1500)),
        st.builds(overwrite, st.just(APART), blocks, lengths.map(bytes)),
        st.builds(lambda at: APART[:at], st.integers(0, END)),
        st.builds(cut_out, st.just(APART), places, lengths),
    )
)
def test_of_samples_whose_parts_lie_apart_every_loss_is_counted(folder, beside, damaged):
    """And none gets a part of another one."""
    batches = epoch_or_refusal(lay_out(folder, damaged, beside))
    keys = {batch.key[0] for batch in batches}
    lost = {number for number in set(range(TOTAL)) - delivered(batches) if key_of(number) not in keys}
    assert min(len(lost), TOTAL if beside else 1) <= count_bad(batches)
    for batch in batches:
        number = int(batch.key[0][:5]) * PER_SHARD + int(batch.key[0][5:9])
        text = members_of(number)["txt"].decode()
        other = {members_of(n)["txt"].decode() for n in range(TOTAL)} - {text}
        assert batch.caption[0] not in other


def test_a_swapped_pair_of_members_is_noticed_by_an_index(folder):
    """Two blocks of the same form change places: every header is right, but not where the index has it."""
    blocks = {member.name: member.offset for member in MEMBERS}
    a, b = blocks["000010001.txt"], blocks["000010002.txt"]
    damaged = overwrite(overwrite(WHOLE[1], a, WHOLE[1][b : b + 1024]), b, WHOLE[1][a : a + 1024])
    batches = epoch(lay_out(folder, damaged, "index"))
    assert count_bad(batches) == 2
    assert delivered(batches) == set(range(TOTAL)) - {PER_SHARD + 1, PER_SHARD + 2}


def test_the_shards_of_this_test_are_what_it_takes_them_for(folder):
    batches = epoch(lay_out(folder, WHOLE[1], ""))
    assert delivered(batches) == set(range(TOTAL))
    assert all(batch.bad == {} for batch in batches)
    assert os.path.getsize(folder / "00001.tar") == LENGTH
    with Image.open(io.BytesIO(members_of(1)["jpg"])) as image:
        assert np.abs(np.asarray(image).astype(int) - picture(1)).max() <= 3
