"""The machine's measured peaks, by a small C++ program that is compiled at first use."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

SOURCE = Path(__file__).with_name("peaks.cpp")
NAMES = ("int8_gops", "float32_gflops", "read_gbs")
NOTHING: dict[str, Any] = dict.fromkeys(NAMES)


def compile_peaks(work: Path) -> Path:
    """The program, built for this processor; OSError or CalledProcessError where there is no compiler that can."""
    key = hashlib.sha256(SOURCE.read_bytes() + platform.machine().encode()).hexdigest()[:12]
    program = work / "tools" / f"peaks-{platform.node()}-{key}"
    if not program.is_file():
        program.parent.mkdir(parents=True, exist_ok=True)
        partial = program.with_suffix(".partial")
        compiler = os.environ.get("CXX", "g++")
        command = [compiler, "-O3", "-march=native", "-pthread", str(SOURCE), "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        partial.rename(program)
    return program


def measure_peaks(work: Path, threads: int) -> dict[str, Any]:
    """Peaks of so many threads: GOP/s, GFLOP/s and GB/s; None with the reason where they cannot be measured."""
    try:
        program = compile_peaks(work)
        said = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True).stdout
        peaks: dict[str, Any] = json.loads(said)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        return {**NOTHING, "reason": " ".join(str(why).split())[:300]}
    return peaks


def middle(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of each."""
    whole: dict[str, Any] = dict(measured[0])
    for name in NAMES:
        if values := [peaks[name] for peaks in measured if peaks[name]]:
            whole |= {name: median(values), f"{name}_range": [min(values), max(values)]}
    return whole
