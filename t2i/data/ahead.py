"""Work that is done ahead, in the background."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")
T = TypeVar("T")


class Ahead(Generic[Key, T]):
    """Makes calls by key, one after the other, in a thread that does not keep the process from ending, as those of
    `concurrent.futures` do. In another process, forked or not, it begins anew."""

    def __init__(self) -> None:
        self._answers: dict[Key, Future[T]] = {}
        self._calls: queue.SimpleQueue[tuple[Callable[[], T], Future[T]]] | None = None
        self._process = 0

    def __reduce__(self) -> tuple[type[Ahead[Key, T]], tuple[()]]:
        return type(self), ()

    def begin(self, key: Key, call: Callable[[], T]) -> None:
        """Once for each key, until it is taken."""
        if self._calls is None or self._process != os.getpid():  # threads do not live on in a forked process
            self._answers, self._calls, self._process = {}, queue.SimpleQueue(), os.getpid()
            threading.Thread(target=_make, args=(self._calls,), daemon=True).start()
        if key not in self._answers:
            self._answers[key] = Future()
            self._calls.put((call, self._answers[key]))

    def take(self, key: Key) -> T | None:
        """What the call returned, waited for if it is being made; None where it has not begun, which it then never
        will, or has failed."""
        answer = self._answers.pop(key, None)
        if self._process != os.getpid() or answer is None or answer.cancel():
            return None
        return None if answer.exception() else answer.result()

    def clear(self) -> None:
        """Nothing of what was begun will be taken."""
        for key in list(self._answers):
            self._answers.pop(key).cancel()


def _make(calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]]) -> None:
    while True:
        call, answer = calls.get()
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)
        del call, answer  # and with them files that are to be closed
