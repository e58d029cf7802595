"""Our own C++ library: which builds there are, which suits this processor, and its functions by ctypes.

Built by `python -m gemvg_edge.engines.native.build`; the wheels have it. Knows no bundle.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from gemvg_edge.engines.native.compiling import FOLDER, INSTRUCTIONS, library_name
from gemvg_edge.errors import GemvgError

VERSION = 1  # of the functions' arguments: a library that was built from other sources is not called
BUILD = "run `python -m gemvg_edge.engines.native.build` (it needs g++)"
CPUINFO = Path("/proc/cpuinfo")


class Stored(ctypes.Structure):
    """A linear layer as a bundle has it (weights.h)."""

    _fields_ = [
        ("bits", c_int), ("n", c_int), ("k", c_int), ("group", c_int), ("codes", c_void_p), ("scales", c_void_p),
        ("floats", c_void_p), ("bias", c_void_p), ("order", c_void_p),
    ]  # fmt: skip


class Tokens(ctypes.Structure):
    """A step of one sequence (language.h)."""

    _fields_ = [
        ("embeddings", c_void_p), ("cos", c_void_p), ("sin", c_void_p), ("cache", c_void_p), ("count", c_int),
        ("past", c_int), ("rows", c_int), ("legal", c_void_p), ("legal_count", c_int), ("logits", c_void_p),
    ]  # fmt: skip


def suitable() -> list[str]:
    """The kinds of instructions that this processor has, the best first."""
    flags = _flags()
    kinds = INSTRUCTIONS.get(platform.machine(), {})
    return [kind for kind, needs in kinds.items() if needs.flags <= flags]


def find_library() -> Path | None:
    """The best library that is built and suits this processor, or None."""
    machine = platform.machine()
    paths = (FOLDER / library_name(machine, kind) for kind in suitable())
    return next((path for path in paths if path.is_file()), None)


def open_library(path: Path | None = None) -> Library:
    """The library at a path, or the best that suits; GemvgError where there is none, or one of other sources."""
    found = path or find_library()
    if found is None:
        kinds = suitable()
        why = "is not built" if kinds else f"has no build for this processor ({platform.machine()})"
        raise GemvgError(
            f"the native engine {why}; {BUILD if kinds else 'open the bundle with engine=' + repr('onnx')}"
        )
    return _load(found)


class Library:
    """The functions, each an error of its own where it says that something is wrong."""

    def __init__(self, path: Path, functions: ctypes.CDLL) -> None:
        self.path, self._functions = path, functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, f"gemvg_{name}")

    def check(self, problem: bytes | None, what: str) -> None:
        """GemvgError for what a function says."""
        if problem:
            raise GemvgError(
                f"{what} cannot be done natively ({problem.decode()}); give fewer or smaller pictures, or close other "
                "programs"
            )

    def made(self, name: str, what: str, *arguments: Any) -> c_void_p:
        """The handle that a function gives by its last argument."""
        handle = c_void_p()
        self.check(getattr(self, name)(*arguments, byref(handle)), what)
        return handle


@functools.cache
def _load(path: Path) -> Library:
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise GemvgError(f"{path} cannot be loaded ({error}); {BUILD}") from None
    signatures: dict[str, tuple[Any, ...]] = {
        "version": (c_int,),
        "engine": (c_char_p, c_int, POINTER(c_void_p)),
        "engine_free": (None, c_void_p),
        "vision": (c_char_p, POINTER(c_int32), POINTER(c_void_p)),
        "language": (c_char_p, POINTER(c_int32), POINTER(c_void_p)),
        "network_free": (None, c_void_p),
        "add_linear": (c_char_p, c_void_p, c_void_p, POINTER(Stored)),
        "add_norm": (c_char_p, c_void_p, c_void_p, c_void_p, c_int, c_float),
        "network_bytes": (c_int64, c_void_p),
        "multiply": (c_char_p, c_void_p, POINTER(Stored), c_int, c_void_p, c_int, c_void_p),
        "encode": (c_char_p, *[c_void_p] * 3, c_int, c_int, *[c_void_p] * 3),
        "cache": (c_char_p, c_void_p, c_int, POINTER(c_int64), POINTER(c_void_p)),
        "cache_free": (None, c_void_p),
        "cache_copy": (None, c_void_p, c_void_p, c_int),
        "forward": (c_char_p, c_void_p, c_void_p, POINTER(Tokens), c_int),
    }
    try:
        for name, (result, *arguments) in signatures.items():
            function = getattr(functions, f"gemvg_{name}")
            function.restype, function.argtypes = result, arguments
            if name == "version" and function() != VERSION:
                raise AttributeError(f"it has version {function()}, not {VERSION}")
    except AttributeError as error:
        raise GemvgError(f"{path} was built from other sources ({error}); {BUILD}") from None
    return Library(path, functions)


def _flags() -> set[str]:
    """What the processor has, by Linux's names."""
    try:
        lines = CPUINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    named = (line.partition(":") for line in lines)
    return next((set(value.split()) for name, _, value in named if name.strip() in ("flags", "Features")), set())
