"""Who else computes while something is measured: shares of a core, from Linux's /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LIMIT = 0.05  # of a core: past this a measurement is not one of a quiet machine
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds
KERNEL = 2  # the parent of the kernel's own threads, which work for whoever asks
COARSE = 2  # ticks: so little may be rounding


class Process(NamedTuple):
    """A process as /proc shows it."""

    name: str
    session: int
    ticks: int  # of processor time so far


@dataclass(frozen=True)
class Noise:
    """The busiest other process of an interval, and what all others took together; shares of a core."""

    name: str
    share: float
    all: float

    def told(self) -> str:
        """In words."""
        return f"{self.name} took {100 * self.share:.0f} % of a core"


QUIET = Noise("", 0.0, 0.0)


def read_stat(text: str) -> tuple[int, Process] | None:
    """One /proc/PID/stat -> (pid, process); None for a thread of the kernel."""
    begin, end = text.index("("), text.rindex(")")
    fields = text[end + 2 :].split()
    if int(fields[1]) == KERNEL:
        return None
    return int(text[:begin]), Process(text[begin + 1 : end], int(fields[3]), int(fields[11]) + int(fields[12]))


def processes(proc: Path = Path("/proc")) -> dict[int, Process]:
    """All processes that there are."""
    found: dict[int, Process] = {}
    for folder in proc.glob("[0-9]*"):
        try:
            read = read_stat((folder / "stat").read_text(encoding="utf-8", errors="replace"))
        except (OSError, ValueError):  # it has ended
            continue
        if read:
            found[read[0]] = read[1]
    return found


def noise_between(
    before: Mapping[int, Process], after: Mapping[int, Process], seconds: float, own: Collection[int]
) -> Noise:
    """What other processes took in the `seconds` between; `own` are our sessions, and this process is ours too."""
    shares = []
    for pid, process in after.items():
        if pid != os.getpid() and process.session not in own:
            ticks = process.ticks - (before[pid].ticks if pid in before else 0)
            if ticks > COARSE:
                shares.append((ticks * TICK / seconds, f"{process.name} ({pid})"))
    if not shares:
        return QUIET
    share, name = max(shares)
    return Noise(name, share, sum(share for share, _ in shares))


def listen(seconds: float) -> Noise:
    """The noise of the next seconds, in which we do nothing."""
    before, started = processes(), time.perf_counter()
    time.sleep(seconds)
    return noise_between(before, processes(), time.perf_counter() - started, ())
