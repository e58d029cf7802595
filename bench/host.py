"""What a call from C++ costs beside the same call from Python: the shipped model, the same pictures and question.

    python -m bench.host [--save bench/results/host.json]

Builds examples/cpp_service with CMake and lets it and this process ask in turn, a block of calls each, while the other
waits. The pictures are pixels in the caller's memory on both sides. Each call is timed by its own side's clock: a look
and a question, and a question alone. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from bench.readme import ROOT
from bench.results import result_file, save_result
from bench.tables.service import host
from gemvg_edge import Grounder
from gemvg_edge.command import command, whole_number
from gemvg_edge.config import cmake_dir
from gemvg_edge.errors import GemvgError

PICTURES, QUERY = ("scene1-a.png", "scene1-b.png"), "all balls"
BOX = ("image", "x1", "y1", "x2", "y2")
CALLS = ("look_and_ground", "ground")
MOST_MS = 1.0  # that a call from C++ may take longer, at the median
Answer = dict[str, Any]  # boxes, and the milliseconds of each call


def build(folder: Path) -> Path:
    """The service, compiled; GemvgError says what CMake or the compiler said."""
    if shutil.which("cmake") is None:
        raise GemvgError("cmake is not installed; apt install cmake g++")
    found = f"-Dgemvg_edge_DIR={cmake_dir()[0]}"
    source = str(ROOT / "examples" / "cpp_service")
    for step in (
        ["cmake", "-S", source, "-B", str(folder), found, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(folder), "--target", "cpp_service"],
    ):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GemvgError(f"{' '.join(step[:2])} failed: {done.stderr[-1000:]}")
    return folder / "cpp_service"


def asked_by_host(service: subprocess.Popen[str], line: str) -> Answer:
    """A line to the service, and what it answers."""
    assert service.stdin is not None
    assert service.stdout is not None
    service.stdin.write(line + "\n")
    service.stdin.flush()
    if not (said := service.stdout.readline()):
        raise BrokenPipeError
    answer: Answer = json.loads(said)
    if "error" in answer:
        raise GemvgError(f"the service says: {answer['error']}")
    return answer


def asked_by_python(grounder: Grounder, pixels: list[Any], calls: int) -> Answer:
    """The same within this process."""
    both = timed(calls, lambda: grounder.look(pixels).ground(QUERY))
    scene = grounder.look(pixels)
    alone = timed(calls, lambda: scene.ground(QUERY))
    boxes = [[box.image, *box.corners] for box in scene.ground(QUERY)]
    return {"boxes": boxes, "look_and_ground_ms": both, "ground_ms": alone}


def timed(calls: int, work: Callable[[], object]) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for _ in range(calls):
        since = time.perf_counter()
        work()
        times.append((time.perf_counter() - since) * 1e3)
    return times


def measure(folder: Path, blocks: int, calls: int) -> dict[str, Any]:
    """Both sides in turn, after a block of each that is not counted."""
    files, pixels = [], []
    for name in PICTURES:
        with Image.open(ROOT / "examples" / "images" / name) as picture:
            pixels.append(np.asarray(picture.convert("RGB")))
        files.append(folder / f"{name}.ppm")
        Image.fromarray(pixels[-1]).save(files[-1])
    line = "\t".join([QUERY, *map(str, files)])
    ours: list[Answer] = []
    pythons: list[Answer] = []
    started = [str(build(folder / "build")), "--repeat", str(calls)]
    try:
        with subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as service:
            grounder = Grounder.open()
            for block in range(blocks + 1):
                ours.append(asked_by_host(service, line))
                pythons.append(asked_by_python(grounder, pixels, calls))
                print(f"block {block} of {blocks}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise GemvgError("the service ended before it answered; see what it said above") from None
    if any([[box[key] for key in BOX] for box in one["boxes"]] != pythons[0]["boxes"] for one in ours):
        raise GemvgError(
            "the boxes of both sides differ: they ask two models; take GEMVG_PYTHON out of the environment"
        )
    return {"blocks": blocks, "calls": calls, "rows": [row(name, ours[1:], pythons[1:]) for name in CALLS]}


def row(name: str, ours: list[Answer], pythons: list[Answer]) -> dict[str, Any]:
    """Medians over all calls, and how far the difference of a pair of blocks may be off that."""
    sides = {"host": ours, "python": pythons}
    times = {side: [ms for block in told for ms in block[f"{name}_ms"]] for side, told in sides.items()}
    pairs = [median(a[f"{name}_ms"]) - median(b[f"{name}_ms"]) for a, b in zip(ours, pythons, strict=True)]
    medians = {f"{side}_ms": median(values) for side, values in times.items()}
    difference = medians["host_ms"] - medians["python_ms"]
    return {"call": name, **medians, "difference_ms": difference, "least_ms": min(pairs), "most_ms": max(pairs)}


@command("bench.host")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.host", description="What a call from C++ costs beside Python's.")
    blocks = "pairs of blocks that are counted (default: %(default)s)"
    parser.add_argument("--blocks", type=whole_number, metavar="N", default=10, help=blocks)
    calls = "calls of each kind in a block (default: %(default)s)"
    parser.add_argument("--calls", type=whole_number, metavar="N", default=100, help=calls)
    saved = "keep the JSON here too, such as bench/results/host.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.blocks < 1 or args.calls < 2:
        parser.error("--blocks must be at least 1 and --calls at least 2")
    with tempfile.TemporaryDirectory(prefix="gemvg-host-") as folder:
        result = measure(Path(folder), args.blocks, args.calls)
    print(host(result))
    for one in result["rows"]:
        met = "met" if one["difference_ms"] <= MOST_MS else "not met"
        print(f"{one['call']}: {one['difference_ms']:+.3f} ms, at most {MOST_MS:g}: {met}")
    save_result(result, args.save)


if __name__ == "__main__":
    main()
