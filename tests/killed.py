"""A process that dies at its n-th change of a name on the disk, played within the test's own process.

From then on every such change is refused, so that nothing on the way out can tidy up, as after `kill -9`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHANGES = ("replace", "rename", "unlink", "remove", "rmdir", "link", "symlink")


class Killed(BaseException):
    """What the dead process's last call raises."""


@contextmanager
def killed_at(number: int) -> Iterator[Callable[[], int]]:
    """Die before the change of this number, counted from 0; what is given says how many were asked for so far."""
    count = 0

    def deadly(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if count >= number:
                raise Killed
            count += 1
            return change(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, deadly(getattr(os, name)))
        yield lambda: count


def every_kill(work: Callable[[], object], start: Callable[[], object]) -> Iterator[int]:
    """For n = 0, 1, ...: `start`, then `work` killed at its n-th change; ends with the first n that it survives."""
    for number in range(1000):
        start()
        try:
            with killed_at(number):
                work()
        except Killed:
            yield number
        else:
            return
    raise AssertionError("never came to an end")
