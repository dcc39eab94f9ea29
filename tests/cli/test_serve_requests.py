"""What `t2i serve` draws with a model as it is loaded, request after request."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from t2i.generation.batch_size import BatchSize
from t2i.generation.recipes import found_in
from t2i.serving.service import Service
from t2i.serving.wanted import Limits, Wanted
from t2i_cli.generators import load


def test_options_of_one_request_are_not_those_of_the_next(ldm_file, tmp_path):
    cpu = torch.device("cpu")
    loaded = load(Path(ldm_file), cpu, [])
    recipe = {"checkpoint": ldm_file, "weights": loaded.weights, "precision": "32-true"}
    service = Service(
        loaded.generator, loaded.sampling, recipe, tmp_path, Limits(), BatchSize(1, cpu), features=None
    )

    def steps_and_scale(**sampling: float) -> tuple[int, float]:
        job = service.ask(Wanted("a red circle", seed=len(list(tmp_path.glob("*.png"))), sampling=sampling))
        began = time.monotonic()
        while not job.ended:
            assert time.monotonic() - began < 300
            time.sleep(0.01)
        drawn = found_in(job.pictures[0])
        assert drawn is not None
        return drawn["sampling"]["steps"], drawn["sampling"]["guidance_scale"]

    usual = steps_and_scale()
    assert usual[0] == 2
    assert steps_and_scale(steps=3) == (3, usual[1])
    assert steps_and_scale(guidance_scale=1.5) == (2, 1.5)
    assert steps_and_scale() == usual
    service.queue.close()
