"""A few profiled steps: parts that add up, a trace, and nothing that stays."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from t2i import families
from t2i.data.loader import CaptionedImages
from t2i.errors import ConfigError, TrainingError
from t2i.training import profiling
from t2i.training.profiling import Profile, profile
from t2i.training.ranges import PARTS, PREFIX, part_of_step
from t2i.training.stage import BaseStage

FLOW = ("experiment=pixel_diffusion/tiny_flow_dit", "data.num_workers=0")


@pytest.fixture
def profiled(compose_run, tmp_path):
    def profiled(*overrides: str, steps: int = 3) -> Profile:
        config = compose_run(*FLOW, f"runs_dir={tmp_path / 'runs'}", *overrides)
        stage_class = families.get(config.family).load_stage(config.stage)
        return profile(config, stage_class, steps, tmp_path / "out")

    return profiled


def test_the_parts_add_up_and_no_run_is_left(profiled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock, times = time.perf_counter, []
    monkeypatch.setattr(
        profiling, "time", SimpleNamespace(perf_counter=lambda: times.append(clock()) or times[-1])
    )
    found = profiled("trainer.micro_batches=2", "ema=short")
    assert list(found.milliseconds) == [*PARTS, "communication", "the rest"]
    assert all(ms > 0 for part, ms in found.milliseconds.items() if part != "communication")
    assert found.milliseconds["communication"] == 0
    assert sum(found.milliseconds.values()) == pytest.approx((times[1] - times[0]) * 1000 / 3)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "out",
        "out/trace.json",
    ]
    events = json.loads(found.trace.read_text())["traceEvents"]
    ranges = Counter(event.get("name") for event in events if event.get("ph") == "X")
    per_step = {"data": 1, "copy": 1, "forward": 2, "backward": 2, "optimizer": 3}
    assert {part: ranges[PREFIX + part] for part in PARTS} == {p: 3 * n for p, n in per_step.items()}


def test_the_steps_are_those_at_the_end_of_a_run(profiled, monkeypatch):
    """With all that begins on the way, such as a discriminator; a run that is shorter has them from its start."""
    seen = list[tuple[int, int]]()
    taken = BaseStage.training_step

    def step(self, *args):
        seen.append((self.images_seen, self.steps_done))
        taken(self, *args)

    monkeypatch.setattr(BaseStage, "training_step", step)
    profiled("trainer.num_images=1_000_003", "trainer.global_batch_size=8", steps=2)
    assert seen == [(8 * done, done) for done in range(124_995, 125_000)]
    seen.clear()
    profiled("trainer.num_images=16", "trainer.batch_size=8", steps=1)
    assert seen == [(8 * done, done) for done in range(4)]


def test_a_slow_loader_shows_as_data(profiled, monkeypatch):
    made = CaptionedImages.__getitem__

    def slow(self, slots):
        time.sleep(0.1)
        return made(self, slots)

    monkeypatch.setattr(CaptionedImages, "__getitem__", slow)
    assert profiled().milliseconds["data"] >= 100


def test_without_a_profiler_a_part_is_nothing():
    assert isinstance(part_of_step("forward"), nullcontext)


def test_what_is_wrong_is_said(profiled, tmp_path):
    with pytest.raises(ConfigError, match=r"^resume is 'latest'; allowed: null"):
        profiled("resume=latest")
    (tmp_path / "out").touch()
    with pytest.raises(TrainingError, match=r"out/trace\.json cannot be written: "):
        profiled(steps=1)


def event(name: str, start: float, end: float, thread: int = 1, gpu: bool = False, said: bool = False):
    return SimpleNamespace(
        name=name,
        thread=thread,
        device_type=DeviceType.CUDA if gpu else DeviceType.CPU,
        is_user_annotation=said,
        time_range=SimpleNamespace(start=start, end=end),
    )


BACKWARD = event(PREFIX + "backward", 100, 200, said=True)


def test_communication_is_what_no_operation_hides():
    """From 150 to 230, of which 50 lie within, 20 of them beside an operation; other threads and wider ranges hide
    nothing."""
    events = [BACKWARD, event("gloo:all_reduce", 150, 230, thread=2, said=True)]
    events += [event("aten::mm", 90, 160), event("aten::mul", 140, 150), event("aten::add", 180, 190)]
    events += [
        event("aten::mm", 100, 200, thread=3),
        event("DistributedDataParallel.forward", 0, 300, said=True),
    ]
    assert profiling._exchanged_alone_us(events, [BACKWARD]) == 30
    assert profiling._exchanged_alone_us(events[:1] + events[2:], [BACKWARD]) == 0


def test_communication_of_gpus_is_that_of_their_kernels():
    events = [BACKWARD, event("nccl:all_reduce", 100, 110, said=True), event("aten::mm", 100, 200)]
    events += [event("ncclDevKernel_AllReduce", 120, 180, gpu=True), event("gemm", 100, 150, gpu=True)]
    events += [event("nccl:all_reduce", 100, 200, gpu=True, said=True)]
    assert profiling._exchanged_alone_us(events, [BACKWARD]) == 30
