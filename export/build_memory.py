"""How much memory building an engine takes, known before it starts, and how much there is.

Knows graphs and the system's memory, no TensorRT; the arithmetic is build_peak's.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from pathlib import Path

import onnx

from export.build_peak import GIB, peak_bytes
from export.engine_graphs import tensor_bytes
from gemvg_edge.errors import GemvgError

CGROUP = Path("/sys/fs/cgroup")  # where a container finds its own
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_GIVE_BACK = 128 * 1024  # bytes; glibc's own threshold grows with what is freed, and freed weights stay in its hands


def build_bytes(model: onnx.ModelProto) -> int:
    """The most memory that building an engine from this graph takes, its weights in the file's cache counted."""
    sizes = [(tensor.data_type == onnx.TensorProto.INT4, tensor_bytes(tensor)) for tensor in model.graph.initializer]
    four, rest = (sum(size for is_four, size in sizes if is_four == wanted) for wanted in (True, False))
    return peak_bytes(four, rest)


def check_memory(models: Iterable[tuple[str, onnx.ModelProto]], on_device: int, free: int) -> int:
    """Bytes that the largest of these builds takes, with `on_device` more; GemvgError where fewer are free."""
    name, needed = max(((name, build_bytes(model)) for name, model in models), key=lambda pair: pair[1])
    needed += on_device
    if needed > free:
        raise GemvgError(
            f"building {name} takes about {needed / GIB:.1f} GiB of memory, and {free / GIB:.1f} are free; close what "
            "else uses it, add swap, or quantise the checkpoint to fewer bits"
        )
    return needed


def available_memory() -> int:
    """Bytes that this process may still take: what the system has, or its container allows."""
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
    return min(found, default=2**63)


def return_freed_memory() -> None:
    """Let glibc give back at once what is freed: a build of 28 layers took 3.1 GiB so, and 3.8 without it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such thing
        libc = ctypes.CDLL(None)
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(option, _GIVE_BACK)
