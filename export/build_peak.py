"""How much memory building an engine takes: factors that were measured, with TensorRT-RTX 1.7 on a CPU.

`python -m bench.engines` measures them again. What a GPU takes comes on top, on a Jetson in the same memory. Pure
arithmetic, for the planner too.
"""

from __future__ import annotations

MIB, GIB = 2**20, 2**30
# How near the peaks of real builds come to this: docs/results.md, "Building engines".
BASE = 350 * MIB  # Python, onnx and the library itself
LOADED = 2.42  # of all weights, while they are read
LAID_OUT, REST = 3.95, 0.75  # of 4-bit weights, which the compiler lays out anew, and of the others meanwhile


def peak_bytes(four: float, rest: float) -> int:
    """The most memory of a build with so many bytes of 4-bit codes and of all other weights."""
    return BASE + int(max(LOADED * (four + rest), LAID_OUT * four + REST * rest))
