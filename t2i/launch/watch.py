"""Which process of a run keeps the others waiting. Each tells by threads of its own how far it is; where one does not
come on for longer than the deadline, the run ends with a sentence that names it. No process waits for this, and nothing
here asks the device."""

from __future__ import annotations

import atexit
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from t2i.few import first_few
from t2i.launch.ranks import Rank

HUNG = 1  # the exit state of a run that ends so
LEFT = "left"
VERDICT = "verdict"
WAITING = "torch.distributed"  # in the place of a process that waits for others


@dataclass(frozen=True)
class Progress:
    """How far a process is: steps that are done, and how often `doing` was called since."""

    step: int = 0
    count: int = 0
    doing: str = "starts"

    @property
    def order(self) -> tuple[int, int]:
        return self.step, self.count


_now = Progress()


def doing(what: str, step: int | None = None) -> None:
    """Notes what this process does from now on; to be called alike by all processes of a run, before they wait for one
    another. step: those that are done, where that has changed"""
    global _now
    _now = Progress(_now.step, _now.count + 1, what) if step is None else Progress(step, 0, what)


def pause_s(deadline_s: float) -> float:
    """Between two times that a process tells how far it is."""
    return min(max(deadline_s / 20, 0.1), 10.0)


def patience_s(deadline_s: float) -> float:
    """What communication itself may take, so that it is the watch that ends a run at the deadline."""
    return deadline_s + 10 * pause_s(deadline_s)


class Watch:
    """The threads of one process. They talk by a store that the first process keeps, or torchrun; all tell it how far
    they are, the first one looks at all of them, the others at the first one and at what it found.

    store: seen by all processes
    say: called with the sentence that names the process; and once where nothing moves, but nobody is behind the others:
        in long work of all of them, or in an exchange that itself goes wrong
    end: ends this process
    """

    def __init__(
        self,
        store: Store,
        rank: Rank,
        deadline_s: float,
        say: Callable[[str], None],
        end: Callable[[], None],
    ) -> None:
        self.store, self.rank, self.deadline_s, self.say, self.end = store, rank, deadline_s, say, end
        self.pause_s = pause_s(deadline_s)
        self.awake_s = 0.0  # since the start, less the time in which this process was itself stopped
        self.beats = 0
        self.found: str | None = None
        self.seen: dict[int, _Seen] = {}
        self.said = False
        self.main = threading.main_thread().ident
        self.over, self.left = threading.Event(), False
        self.threads = [
            threading.Thread(target=self._exchange, name="watch", daemon=True),
            threading.Thread(target=self._judge, name="watch", daemon=True),
        ]

    @classmethod
    def begun(
        cls,
        environment: Mapping[str, str],
        rank: Rank,
        deadline_s: float,
        children: Sequence[subprocess.Popen[Any]] = (),
    ) -> Watch:
        """Over the processes that have found one another at MASTER_ADDR and MASTER_PORT.

        children: of the run's processes, those that this one started
        """

        def say(sentence: str) -> None:
            sys.stderr.write(f"t2i: {sentence}\n")
            sys.stderr.flush()

        def end() -> None:
            for child in children:
                child.kill()  # it may be one that was stopped
            os._exit(HUNG)  # the main thread waits within a library

        # A connection of its own: one in which somebody waits answers nobody else.
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        client = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=deadline_s))
        start = environment.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the processes
        watch = cls(PrefixStore(f"t2i/watch/{start}", client), rank, deadline_s, say, end)
        watch.start()
        atexit.register(watch.stop)  # a thread within the store's library must not outlive the interpreter
        return watch

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def leave(self) -> None:
        """At the end of the run: the others do not wait for this process any more."""
        self.left = True
        self.stop()
        atexit.unregister(self.stop)

    def stop(self) -> None:
        """Ends the threads."""
        self.over.set()
        self.threads[0].join(timeout=2 * self.pause_s)

    def _exchange(self) -> None:
        """A store whose process was stopped does not answer, however long; so `_judge` has a thread of its own."""
        others = range(self.rank.world) if self.rank.rank == 0 else [0]
        while True:
            try:
                self.store.set(str(self.rank.rank), json.dumps(self._told()))
                if self.over.is_set():
                    return
                if self.rank.rank and self.store.check([VERDICT]):
                    self.found = VERDICT
                for other, told in zip(
                    others, self.store.multi_get([str(other) for other in others]), strict=True
                ):
                    self._hear(other, told)
            except RuntimeError:  # no answer, which counts as such in time
                if self.over.is_set():
                    return
            self.over.wait(self.pause_s)

    def _told(self) -> dict[str, Any]:
        self.beats += 1
        return {
            "beat": LEFT if self.left else self.beats,
            "step": _now.step,
            "count": _now.count,
            "doing": _now.doing,
            "host": platform.node(),
            "place": place_of(frame_of(self.main or 0)),
        }

    def _hear(self, rank: int, told: bytes) -> None:
        beat = json.loads(told)
        seen = self.seen.get(rank)
        if seen is None or seen.beat["beat"] != beat["beat"]:
            now = moved_s = stands_s = self.awake_s
            if seen is not None and seen.order == (beat["step"], beat["count"]):
                moved_s = seen.moved_s
                stands_s = seen.stands_s if seen.beat["place"] == beat["place"] else now
            self.seen[rank] = _Seen(beat, now, moved_s, stands_s)

    def _judge(self) -> None:
        last = time.monotonic()
        while not self.over.wait(self.pause_s):
            now = time.monotonic()
            self.awake_s += min(now - last, 2 * self.pause_s)
            last = now
            sentence = self.judged() if self.found is None else None
            if sentence and (self.rank.rank == 1 or self.rank.local == 0):
                self.say(sentence)
            if sentence and self.rank.rank == 0:
                self._tell()
            if sentence or self.found is not None:
                self.end()

    def judged(self) -> str | None:
        """The sentence that ends the run; None while there is none to say."""
        seen = {rank: each for rank, each in self.seen.copy().items() if each.beat["beat"] != LEFT}
        unheard = {rank: self.awake_s - each.heard_s for rank, each in seen.items()}
        if self.rank.rank == 0 and (alone_s := unheard.pop(0, 0.0)) >= self.deadline_s:
            return self._ended([f"nothing was heard of the other processes for {alone_s:.0f} s"])
        if silent := [rank for rank, age_s in unheard.items() if age_s >= self.deadline_s]:
            return self._ended(
                [
                    f"{_name(rank, seen[rank])} was last heard of {unheard[rank]:.0f} s ago, {_at(seen[rank])}"
                    for rank in silent
                ]
            )
        if self.rank.rank or not seen:
            return None
        unmoved = {rank: self.awake_s - each.moved_s for rank, each in seen.items()}
        lowest = min(each.order for each in seen.values())
        behind = [rank for rank, each in seen.items() if each.order == lowest]
        stand = self.awake_s - max(each.stands_s for each in seen.values()) >= self.deadline_s
        if stand and len(behind) == len(seen):
            behind = [rank for rank in seen if WAITING not in seen[rank].beat["place"]]
        stuck = [rank for rank in behind if unmoved[rank] >= self.deadline_s]
        if stuck and len(behind) < len(seen):
            return self._ended(
                [
                    f"{_name(rank, seen[rank])} keeps the others waiting for {unmoved[rank]:.0f} s, {_at(seen[rank])}, "
                    f"{seen[rank].beat['place']}"
                    for rank in stuck
                ]
            )
        if min(unmoved.values()) >= self.deadline_s + 3 * self.pause_s and not self.said:
            self.said = True
            self.say(f"nothing moves for {self.deadline_s:g} s: {together(seen)}.")
        return None

    def _ended(self, said: list[str]) -> str:
        return f"{'; '.join(first_few(said))}: the run ends (trainer.deadline_s={self.deadline_s:g})."

    def _tell(self) -> None:
        """The others may have to ask the first process, which ends after this."""
        try:
            self.store.set(VERDICT, "")
            time.sleep(2 * self.pause_s)
        except RuntimeError:
            pass


@dataclass(frozen=True)
class _Seen:
    """beat: what a process told last; heard_s, moved_s, stands_s: when that was, when it had come further, and when it
    stood in another place of the code"""

    beat: dict[str, Any]
    heard_s: float
    moved_s: float
    stands_s: float

    @property
    def order(self) -> tuple[int, int]:
        return self.beat["step"], self.beat["count"]


def frame_of(thread: int) -> FrameType | None:
    """Where the thread of this number stands. Without a collection of garbage meanwhile: Python 3.11 holds a lock that
    starting a thread needs, and what a collection runs may let another thread start one: both would wait for ever
    (python/cpython#106883)."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames().get(thread)
    finally:
        if collects:
            gc.enable()


def place_of(frame: FrameType | None) -> str:
    """Where a thread stands: "t2i.training.step:79 train_step > torch.autograd.graph:12 _engine_run_backward": in our
    code, and in what that called."""
    places: list[str] = []
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        own = module.partition(".")[0] in ("t2i", "t2i_cli")
        if own or not places:
            places.append(f"{module}:{frame.f_lineno} {frame.f_code.co_name}")
        if own:
            break
        frame = frame.f_back
    return " > ".join(reversed(places))


def together(seen: Mapping[int, _Seen]) -> str:
    """What all processes do, those that do the same together."""
    groups: dict[str, list[int]] = {}
    for rank, each in sorted(seen.items()):
        groups.setdefault(f"{_at(each)}, {each.beat['place']}", []).append(rank)
    said = []
    for what, ranks in groups.items():
        others = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        said.append(f"{_name(ranks[0], seen[ranks[0]])}{others} {what}")
    return "; ".join(first_few(said))


def _name(rank: int, seen: _Seen) -> str:
    return f"process {rank} on {seen.beat['host']}"


def _at(seen: _Seen) -> str:
    return f"at step {seen.beat['step']} ({seen.beat['doing']})"
