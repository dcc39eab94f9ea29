"""Who keeps the others waiting, judged by what the processes tell."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
from torch.distributed import HashStore

from t2i.launch import watch as module
from t2i.launch.ranks import Rank
from t2i.launch.watch import LEFT, Watch, patience_s, pause_s, place_of

BACKWARD = "t2i.training.step:79 train_step > torch.autograd.graph:865 _engine_run_backward"
GATHERS = "t2i.training.callbacks:160 mean > torch.distributed.distributed_c10d:3100 all_reduce"
LOADS = "t2i.data.loader:10 next"


class Told:
    """A watch of one process, whose clock is turned by hand."""

    def __init__(self, rank: int = 0, world: int = 4, deadline_s: float = 60.0) -> None:
        self.said: list[str] = []
        of = Rank(rank, world, rank, world)
        self.watch = Watch(HashStore(), of, deadline_s, self.said.append, lambda: None)
        self.beats = 0

    def at(self, second: float, *told: tuple[int, int, int, str] | tuple[int, str]) -> str | None:
        """What is judged at this second. told: of each process that tells something, rank, step, count and place"""
        self.watch.awake_s = second
        for each in told:
            self.beats += 1
            beat = {"beat": self.beats, "doing": "backward", "host": f"n{each[0]}"}
            if len(each) == 2:
                beat |= {"beat": LEFT, "step": 0, "count": 0, "place": ""}
            else:
                beat |= dict(zip(("step", "count", "place"), each[1:], strict=True))
            self.watch._hear(each[0], module.json.dumps(beat).encode())
        return self.watch.judged()


def test_a_process_that_is_stopped_is_named_at_the_deadline_and_not_before():
    told = Told()
    all_at = [(rank, 7, 3, BACKWARD) for rank in range(4)]
    assert told.at(0, *all_at) is None
    for second in range(10, 60, 10):
        assert told.at(second, *(each for each in all_at if each[0] != 2)) is None
    sentence = told.at(60, *(each for each in all_at if each[0] != 2))
    assert sentence == (
        "process 2 on n2 was last heard of 60 s ago, at step 7 (backward): the run ends (trainer.deadline_s=60)."
    )


def test_a_process_that_stays_behind_is_named_with_the_place_where_it_stands():
    told = Told()
    for second in range(0, 60, 10):
        assert told.at(second, (0, 8, 3, BACKWARD), (1, 8, 0, LOADS), (2, 8, 3, BACKWARD)) is None
    sentence = told.at(60, (0, 8, 3, BACKWARD), (1, 8, 0, LOADS), (2, 8, 3, BACKWARD))
    assert sentence is not None
    assert sentence.startswith(
        "process 1 on n1 keeps the others waiting for 60 s, at step 8 (backward), " + LOADS
    )
    assert "process 0" not in sentence
    assert "process 2" not in sentence


def test_one_that_comes_on_slowly_is_not_named():
    """Each step takes it nearly as long as the deadline, and the others wait for it each time."""
    told = Told()
    for second in range(0, 600, 10):
        step = second // 50
        assert told.at(second, (0, step + 1, 2, BACKWARD), (1, step, 4, LOADS)) is None
    assert told.said == []


def test_of_processes_in_one_place_the_one_that_does_not_wait_for_others_is_named():
    told = Told()
    for second in range(0, 60, 10):
        assert told.at(second, (0, 8, 4, GATHERS), (1, 8, 4, LOADS)) is None
    sentence = told.at(60, (0, 8, 4, GATHERS), (1, 8, 4, LOADS))
    assert sentence is not None
    assert sentence.startswith("process 1 on n1 keeps the others waiting")
    assert told.said == []


@pytest.mark.parametrize("place", [LOADS, GATHERS])
def test_long_work_of_all_is_said_once_and_ends_nothing(place):
    told = Told()
    for second in range(0, 300, 10):
        assert told.at(second, (0, 8, 4, place), (1, 8, 4, place)) is None
    assert told.said == [f"nothing moves for 60 s: process 0 on n0 and 1 more at step 8 (backward), {place}."]


def test_nobody_waits_for_one_that_left():
    told = Told()
    told.at(0, (0, 8, 4, LOADS), (1, 8, 3, BACKWARD))
    told.at(10, (1, LEFT))
    for second in range(10, 200, 10):
        assert told.at(second, (0, 8, 4, LOADS)) is None


def test_others_name_the_first_process_and_it_names_no_one_where_nothing_is_heard():
    of_third = Told(rank=3)
    assert of_third.at(0, (0, 8, 4, LOADS)) is None
    sentence = of_third.at(61)
    assert sentence is not None
    assert sentence.startswith("process 0 on n0 was last heard of 61 s ago, at step 8")
    of_first = Told()
    of_first.at(0, *((rank, 8, 4, LOADS) for rank in range(4)))
    sentence = of_first.at(61)
    assert sentence is not None
    assert sentence.startswith("nothing was heard of the other processes for 61 s")


def test_the_watch_speaks_before_communication_itself_gives_up():
    for deadline_s in (1.0, 60.0, 600.0, 86_400.0):
        assert deadline_s + 5 * pause_s(deadline_s) < patience_s(deadline_s)


def test_what_is_being_done_reaches_the_others():
    """By a store that both see; the first process tells what it found, and the other one leaves without a word."""
    store, said, ended = HashStore(), list[str](), threading.Event()
    watches = [Watch(store, Rank(rank, 2, rank, 2), 0.5, said.append, ended.set) for rank in range(2)]
    watches[0].start()
    watches[1].threads[0].start()  # it tells, until it is stopped
    module.doing("draws", step=41)
    until = threading.Event()
    while not (watches[0].seen.get(1) and watches[0].seen[1].beat["step"] == 41):
        until.wait(0.01)
    assert watches[0].seen[1].beat["doing"] == "draws"
    watches[1].stop()
    assert ended.wait(20)
    watches[0].stop()
    assert said[-1].startswith("process 1 on ")
    assert "at step 41 (draws)" in said[-1]
    assert store.check([module.VERDICT])


def test_a_place_is_ours_and_what_it_called():
    assert place_of(sys._getframe()).startswith("tests.launch") or "test_launch_watch" in place_of(
        sys._getframe()
    )
    assert place_of(None) == ""


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_a_thread_is_looked_at(monkeypatch, collects):
    """In Python 3.11 a process could wait for ever there."""
    found, seen = sys._current_frames, list[bool]()
    monkeypatch.setattr(sys, "_current_frames", lambda: (seen.append(gc.isenabled()), found())[1])
    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        frame = module.frame_of(threading.get_ident())
        assert (seen, gc.isenabled()) == ([False], collects)
    finally:
        (gc.enable if before else gc.disable)()
    assert frame is not None
    assert module.frame_of(0) is None
