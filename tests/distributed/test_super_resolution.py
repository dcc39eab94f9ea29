"""Stages that build on two runs: the same training on 1 and on 2 processes, in one part and in several, and resumed.
Beside test_global_batch.py and test_resume_otherwise.py, which have the stages with small experiments."""

from __future__ import annotations

import json

import as_torchrun
import pytest
from test_global_batch import SHARED, WAYS, losses, worker
from test_resume_otherwise import check

SPLITS = ("ddp 2 x 4", "ddp 2 x 2 x 2", "full_shard 2 x 2 x 2")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["masked_sr", "ar_sr"])
def test_it_is_the_same_however_it_is_split_and_resumed(
    stage, super_resolution, tiny_vq, compose_run, train, shapes_overrides, tmp_path
):
    name, *others = [*super_resolution[stage], f"builds_on.codec={tiny_vq}"]
    asked = [f"experiment={name}", *others]
    whole = train(compose_run(*asked, *SHARED, "trainer.batch_size=8", f"runs_dir={tmp_path / 'one'}"))
    one = losses(whole.folder)
    assert [row["images"] for row in one] == [8, 16, 24, 32]
    ways = {way: [*asked, *WAYS[way]] for way in SPLITS}
    as_torchrun.together(worker, (as_torchrun.free_ports(len(ways)), ways, shapes_overrides, str(tmp_path)))
    for way, rows in json.loads((tmp_path / "losses.json").read_text()).items():
        assert rows == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in one], way
    check(name, others, compose_run, train, shapes_overrides, tmp_path / "resumed")
