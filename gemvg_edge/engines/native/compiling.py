"""How the native library is compiled, once per instruction set. Imports nothing but Python's own modules: the wheel's
build (hatch_build.py) loads this file by its path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
SOURCES = ("engine.cpp", "pool.cpp")
OPTIONS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread",
    "-fvisibility=hidden", "-static-libstdc++", "-static-libgcc",
)  # fmt: skip


class CannotCompile(Exception):
    """There is no compiler, or it says no; the text names the fix."""


class Instructions(NamedTuple):
    """A set of instructions that a library is compiled for."""

    flags: frozenset[str]  # that the processor must have, as Linux names them
    options: tuple[str, ...]  # of the compiler


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_AVX2_FLAGS = frozenset(("avx2", "fma", "f16c", "bmi2"))
_AVX512_FLAGS = _AVX2_FLAGS | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
# By machine, the best first.
INSTRUCTIONS: dict[str, dict[str, Instructions]] = {
    "x86_64": {
        "avx512bf16": Instructions(_AVX512_FLAGS | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
        "avx512": Instructions(_AVX512_FLAGS, _AVX512),
        "avxvnni": Instructions(_AVX2_FLAGS | {"avx_vnni"}, (*_AVX2, "-mavxvnni")),
        "avx2": Instructions(_AVX2_FLAGS, _AVX2),
    },
    "aarch64": {
        "i8mm": Instructions(frozenset(("asimddp", "i8mm")), ("-march=armv8.2-a+fp16+dotprod+i8mm",)),
        "dotprod": Instructions(frozenset(("asimddp",)), ("-march=armv8.2-a+fp16+dotprod",)),
    },
}


def library_name(machine: str, kind: str) -> str:
    """The file of one build."""
    return f"libgemvg-{machine}-{kind}.so"


def compile_all(compiler: str, machine: str, target: Path = FOLDER) -> list[Path]:
    """Compile every library for a machine ("x86_64" or "aarch64") -> their paths; each is replaced in one go."""
    if not shutil.which(compiler):
        raise CannotCompile(f"there is no {compiler!r} here; install it (apt-get install g++), or give --compiler")
    if machine not in INSTRUCTIONS:
        known = ", ".join(INSTRUCTIONS)
        raise CannotCompile(f"there is no native library for {machine!r}, only for {known}; use ONNX Runtime")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda kind: _compile(compiler, machine, kind, target), INSTRUCTIONS[machine]))


def _compile(compiler: str, machine: str, kind: str, target: Path) -> Path:
    path = target / library_name(machine, kind)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    sources = [str(FOLDER / "src" / name) for name in SOURCES]
    command = [compiler, *OPTIONS, *INSTRUCTIONS[machine][kind].options, *sources, "-o", str(partial)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = done.stderr.strip()[-2000:]
            raise CannotCompile(f"{compiler} does not compile {path.name}: {why}; use g++ 11 or newer")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
