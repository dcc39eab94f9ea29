"""Draws what is asked for, one request after the other, in the order in which they came."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from t2i.errors import UserError
from t2i.serving.wanted import Asked

State = Literal["waiting", "drawing", "done", "stopped", "failed"]
KEPT = 1000  # jobs that have ended, of which one may still ask


class QueueFull(UserError):
    """As many requests wait as may."""


class Stopped(Exception):
    """Raised within the drawing of a job that is to stop."""


@dataclass
class Job:
    """One request.

    asked: None once it has ended: its pictures take memory
    sampling: the family's own options; note: what a person should know of it
    count: of the pictures that are asked for
    step, steps: of the pictures that are being drawn
    pictures: files that were written
    error: the sentence that says why it failed
    """

    asked: Asked | None
    sampling: Any
    note: str = ""
    count: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = "waiting"
    step: int = 0
    steps: int = 0
    pictures: list[Path] = field(default_factory=list)
    error: str | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    def progress(self, step: int, steps: int) -> None:
        """Called after each step. Raises Stopped where the job is to stop."""
        self.step, self.steps = step, steps
        if self.stop.is_set():
            raise Stopped


class DrawingQueue:
    """draw: draws a job's pictures, adds their files to job.pictures as they are written, calls job.progress
    max_waiting: how many jobs may wait
    """

    def __init__(self, draw: Callable[[Job], None], max_waiting: int) -> None:
        self.draw, self.max_waiting = draw, max_waiting
        self.waiting: OrderedDict[str, Job] = OrderedDict()
        self.known: OrderedDict[str, Job] = OrderedDict()
        self.drawing: Job | None = None
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises QueueFull."""
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{self.max_waiting} requests wait already: ask again later.")

    def add(self, asked: Asked, sampling: Any, note: str = "") -> Job:
        """Raises QueueFull."""
        job = Job(asked, sampling, note, len(asked.request.prompts))
        with self.changed:
            self.check()
            self.waiting[job.id] = self.known[job.id] = job
            ended = [each.id for each in self.known.values() if each.ended]
            for each in ended[: max(len(ended) - KEPT, 0)]:
                del self.known[each]
            self.changed.notify_all()
        return job

    def get(self, id: str) -> Job | None:
        return self.known.get(id)

    def ahead(self, job: Job) -> int:
        """How many are drawn before it."""
        with self.changed:
            if job.id not in self.waiting:
                return 0
            return list(self.waiting).index(job.id) + (self.drawing is not None)

    def stop(self, job: Job) -> None:
        """What was drawn of it stays."""
        with self.changed:
            job.stop.set()
            if self.waiting.pop(job.id, None):
                job.state, job.asked = "stopped", None

    def close(self) -> None:
        """Stops all, and waits for the step that is being done."""
        with self.changed:
            self.closed = True
            for job in list(self.waiting.values()) + ([self.drawing] if self.drawing else []):
                self.stop(job)
            self.changed.notify_all()
        self.thread.join()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                _, job = self.waiting.popitem(last=False)
                self.drawing, job.state = job, "drawing"
            try:
                self.draw(job)
                job.state = "done"
            except Stopped:
                job.state = "stopped"
            except UserError as error:
                job.state, job.error = "failed", str(error)
            except Exception as error:  # one request's fault is not the server's end
                job.state, job.error = "failed", f"{type(error).__name__}: {error}"
            finally:
                with self.changed:
                    self.drawing = job.asked = None
