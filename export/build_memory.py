"""How much memory building an engine takes, known before it starts, and what is done that it is no more.

Knows graphs, no TensorRT; the arithmetic is build_peak's.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable

import onnx

from export.build_peak import GIB, peak_bytes
from export.engine_graphs import tensor_bytes
from gemvg_edge.errors import GemvgError

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_GIVE_BACK = 128 * 1024  # bytes; glibc's own threshold grows with what is freed, and freed weights stay in its hands


def build_bytes(model: onnx.ModelProto) -> int:
    """The most memory that building an engine from this graph takes, its weights in the file's cache counted."""
    sizes = [(tensor.data_type == onnx.TensorProto.INT4, tensor_bytes(tensor)) for tensor in model.graph.initializer]
    four, rest = (sum(size for is_four, size in sizes if is_four == wanted) for wanted in (True, False))
    return peak_bytes(four, rest)


def check_memory(models: Iterable[tuple[str, onnx.ModelProto]], on_device: int, free: int | None) -> int:
    """Bytes that the largest of these builds takes, with `on_device` more; GemvgError where fewer are free.

    `free` is None where the system does not tell.
    """
    name, needed = max(((name, build_bytes(model)) for name, model in models), key=lambda pair: pair[1])
    needed += on_device
    if free is not None and needed > free:
        raise GemvgError(
            f"building {name} takes about {needed / GIB:.1f} GiB of memory, and {free / GIB:.1f} are free; close what "
            "else uses it, add swap, or quantise the checkpoint to fewer bits"
        )
    return needed


def return_freed_memory() -> None:
    """Let glibc give back at once what is freed, or a build's peak would be what its heap keeps of earlier weights."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such thing
        libc = ctypes.CDLL(None)
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(option, _GIVE_BACK)
