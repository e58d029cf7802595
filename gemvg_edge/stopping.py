"""When a request has to end before it is answered: a deadline, or an event that another thread sets.

Looked at between the phases of a request and after each token: one run of a network is never cut. Knows no model.
"""

from __future__ import annotations

import math
import numbers
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gemvg_edge.errors import Cancelled, GemvgError, TimedOut
from gemvg_edge.json_object import short

POLL = 0.05  # seconds between two looks at an event while a lock is waited for


@dataclass(frozen=True)
class Stopping:
    """Until when a request may work, on `time.monotonic`'s clock, and what calls it off."""

    timeout: float = math.inf  # seconds, as it was given
    deadline: float = math.inf
    cancel: threading.Event | None = None

    def check(self) -> None:
        """TimedOut or Cancelled where the time has come."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("the request was cancelled before it was answered")
        if time.monotonic() > self.deadline:
            raise TimedOut(f"no answer within timeout={self.timeout:g} s; give it longer, or fewer or smaller pictures")

    def patience(self) -> float | None:
        """Seconds to wait before the next `check`; None for as long as it takes."""
        if self.cancel is not None:
            return POLL
        left = self.deadline - time.monotonic()
        return None if math.isinf(left) else max(0.0, left)


class Turn:
    """What one request at a time has, in the order in which they came; knows a request that waits for itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._owner = 0

    @contextmanager
    def taken(self, stop: Stopping) -> Iterator[None]:
        """One's turn, waited for as long as the request may work.

        GemvgError where this thread has it, as in an `on_text` that asks the scene it is called from.
        """
        if self._owner == threading.get_ident():
            raise GemvgError("on_text asked for more of what it is called from; ask when the answer is there")
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._owner or self._waiting[0] is not ticket:
                    self._changed.wait(stop.patience())
                    stop.check()
                self._owner = threading.get_ident()
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            stop.check()
            yield
        finally:
            with self._changed:
                self._owner = 0
                self._changed.notify_all()


def stopping(timeout: float | None, cancel: threading.Event | None) -> Stopping:
    """What `timeout` (seconds from now) and `cancel` ask for; GemvgError for what is neither."""
    if cancel is not None and not isinstance(cancel, threading.Event):
        raise GemvgError(f"cancel is a {type(cancel).__name__}; give a threading.Event, and set it to cancel")
    if timeout is None:
        return Stopping(cancel=cancel)
    number = isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
    if not number or not 0 < timeout <= threading.TIMEOUT_MAX:
        raise GemvgError(f"timeout={short(timeout)}; give the seconds that an answer may take, above 0, or None")
    return Stopping(float(timeout), time.monotonic() + float(timeout), cancel)
