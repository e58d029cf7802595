"""Run a target on mutated seeds: a few, as a test does, or for minutes (`python -m tests.fuzz`).

A target is a module here with `seeds()` and `check(data)`, which raises for a wrong result of a reader.
"""

from __future__ import annotations

import importlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import Edit, edits, mutate

HANG = 20  # seconds that one input may take
BATCH = 500  # inputs between two looks at the clock


def targets() -> list[str]:
    """The names of all targets."""
    mine = {"__init__", "__main__", "drive", "guided", "mutations"}
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in mine)


def open_target(name: str) -> ModuleType:
    """A target's module."""
    return importlib.import_module(f"tests.fuzz.{name}")


def run_seeds(target: ModuleType) -> int:
    """Check every seed as it is; how many there are."""
    for data in target.seeds():
        with _no_hang():
            target.check(data)
    return len(target.seeds())


def run_mutated(target: ModuleType, examples: int, number: int, on_failure: Callable[[bytes], None]) -> None:
    """Check so many mutated seeds, drawn by `number`; a failing one is shrunk, handed over and raised."""
    seeds = target.seeds()
    failing: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(seeds) - 1), edits)
    def attempt(which: int, changes: list[Edit]) -> None:
        data = mutate(seeds[which], changes, seeds)
        failing[:] = [data]
        with _no_hang():
            target.check(data)

    try:
        attempt()
    except BaseException:
        on_failure(failing[0])
        raise


def run_for(target: ModuleType, seconds: float, number: int, on_failure: Callable[[bytes], None]) -> int:
    """Check mutated seeds until the time is over; how many were."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        run_mutated(target, BATCH, number * 1_000_003 + count, on_failure)
        count += BATCH
    return count


@contextmanager
def _no_hang() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it takes longer than {HANG} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
