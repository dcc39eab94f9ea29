"""trainer.global_batch_size: the pictures of a step, shared out over however many processes."""

from __future__ import annotations

import pytest

from t2i.config import TrainerConfig
from t2i.errors import ConfigError


@pytest.mark.parametrize(
    ("devices", "num_nodes", "batch_size", "per_process", "at_a_time"),
    [
        (1, 1, 8, 24, 8),
        (2, 1, 8, 12, 6),
        (1, 3, 8, 8, 8),
        (4, 2, 8, 3, 3),
        (2, 1, 5, 12, 4),
        (1, 1, 1, 24, 1),
    ],
)
def test_each_process_takes_its_share_in_few_equal_parts(
    devices, num_nodes, batch_size, per_process, at_a_time
):
    trainer = TrainerConfig(100, batch_size, devices=devices, num_nodes=num_nodes, global_batch_size=24)
    assert trainer.images_per_process == per_process
    assert trainer.images_at_a_time == at_a_time
    assert trainer.parts(per_process) * at_a_time == per_process


def test_without_it_each_process_has_its_own_batch():
    trainer = TrainerConfig(100, 8, micro_batches=2, devices=3)
    assert (trainer.images_per_process, trainer.images_at_a_time) == (8, 4)


@pytest.mark.parametrize("whole", [0, 6, 2, -4])
def test_what_does_not_divide_is_said(whole):
    with pytest.raises(
        ConfigError, match=rf"trainer.global_batch_size is {whole}; allowed: multiples of 4, the number"
    ):
        TrainerConfig(100, 1, devices=2, num_nodes=2, global_batch_size=whole)


def test_the_number_of_parts_follows_from_it():
    with pytest.raises(
        ConfigError, match=r"trainer.micro_batches is 2; allowed: 1 with trainer.global_batch_size"
    ):
        TrainerConfig(100, 2, micro_batches=2, global_batch_size=8)
