"""How much memory this process may still take, as Linux tells it."""

from __future__ import annotations

import contextlib
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # where a container finds its own


def available_memory() -> int | None:
    """Bytes that the system can give, or its container allows, files held in memory among them; None: neither tells."""
    found = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max" where nothing is limited
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        # Used is also what the system holds of files for as long as nobody else needs the room.
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        held = sum(int(counts[name]) for name in ("active_file", "inactive_file"))
        found.append(max(0, limit - used + held))
    return min(found, default=None)
