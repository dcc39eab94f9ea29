"""Stages that build on two runs: the same training on 1 and on 2 processes, in one part and in several, and resumed.
Beside test_global_batch.py and test_resume_otherwise.py, which have the stages with small experiments."""

from __future__ import annotations

import json

import as_torchrun
import pytest
from test_global_batch import SHARED, WAYS, losses, worker
from test_resume_otherwise import check

# By stage: the experiment of the run that it builds on, and what else is typed.
STAGES = {
    "masked_sr": ("masked/tiny_masked", ["low.depth=1"]),
    "ar_sr": ("autoregressive/tiny_ar", []),
}
SPLITS = ("ddp 2 x 4", "ddp 2 x 2 x 2", "full_shard 2 x 2 x 2")


@pytest.fixture(scope="module")
def typed(compose_run, train, tmp_path_factory):
    """(stage) -> what is typed, on a codec of 4 px a code and a run at 16 px."""
    folder = tmp_path_factory.mktemp("built_on")
    few = ("trainer.num_images=16", f"runs_dir={folder}")
    codec = train(compose_run("experiment=autoencoder/tiny_vq", *few)).folder

    def typed(stage: str) -> list[str]:
        experiment, own = STAGES[stage]
        on = f"builds_on.codec={codec}"
        low = train(compose_run(f"experiment={experiment}", on, "resolution.size_px=16", *few)).folder
        codes = ["low.num_codes=64", "low.side=4", *own]
        return [f"experiment={experiment}", f"stage={stage}", on, f"builds_on.low={low}", *codes]

    return typed


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_it_is_the_same_however_it_is_split_and_resumed(
    stage, typed, compose_run, train, shapes_overrides, tmp_path
):
    asked = typed(stage)
    whole = train(compose_run(*asked, *SHARED, "trainer.batch_size=8", f"runs_dir={tmp_path / 'one'}"))
    one = losses(whole.folder)
    assert [row["images"] for row in one] == [8, 16, 24, 32]
    ways = {way: [*asked, *WAYS[way]] for way in SPLITS}
    as_torchrun.together(worker, (as_torchrun.free_ports(len(ways)), ways, shapes_overrides, str(tmp_path)))
    for way, rows in json.loads((tmp_path / "losses.json").read_text()).items():
        assert rows == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in one], way
    experiment, *others = asked
    name = experiment.removeprefix("experiment=")
    check(name, others, compose_run, train, shapes_overrides, tmp_path / "resumed")
