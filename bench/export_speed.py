"""What an export costs beside a plain copy of the checkpoint's files, at Qwen2-VL-2B's size and in float16.

    python -m bench.export_speed [--folder data/qwen2-vl-2b-float16] [--save bench/results/export_speed.json]

Whole processes, each export after a copy that it is set against, until a sync has it all on the disk; the sha256 of
every file is part of the export. All start some seconds after the last files were deleted: a virtual machine gives
freed memory back to its host within seconds, and until then writing is several times faster than later. How much it
finds after that varies still, and a copy's time with it, so its fastest and slowest are kept too. Weights are random.
Needs about 9 GB of disk, which is freed at the end. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median

from bench.memory import peak_of
from bench.results import result_file, save_result
from gemvg_edge.command import command
from train.output_folder import WORK, marked

ROUNDS = 5
PAUSE = 8  # seconds


def timed(command: list[str], out: Path) -> tuple[float, float]:
    """(peak GiB, seconds until all of it is on the disk) of a command that writes a folder, which is taken away."""
    os.sync()
    time.sleep(PAUSE)
    started = time.perf_counter()
    peak, _ = peak_of(command)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return peak, seconds


@command("bench.export_speed")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.export_speed", description="Time and peak memory of a float16 export beside a copy."
    )
    place = "the folder to work in, taken away at the end (default: %(default)s)"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", default=Path("data/qwen2-vl-2b-float16"), help=place)
    saved = "keep the JSON here too, such as bench/results/export_speed.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    with marked(args.folder, {"format": WORK}) as folder:
        checkpoint, out = folder / "checkpoint", folder / "out"
        peak_of([sys.executable, "-m", "bench.random_checkpoint", str(checkpoint), "--dtype", "float16"])
        copy = ["cp", "-r", "--reflink=never", str(checkpoint), str(out)]
        commands = {
            dialect: [sys.executable, "-m", "export.to_onnx", str(checkpoint), str(out), "--precision", "float16",
                      "--dialect", dialect]
            for dialect in ("fused", "plain")
        }  # fmt: skip
        copies: dict[str, list[float]] = {name: [] for name in commands}
        times: dict[str, list[float]] = {name: [] for name in commands}
        peaks = dict.fromkeys(commands, 0.0)
        for _ in range(ROUNDS):
            for name, export in commands.items():
                copies[name].append(timed(copy, out)[1])
                peak, seconds = timed(export, out)
                times[name].append(seconds)
                peaks[name] = max(peaks[name], peak)
        size = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e9
    rows = [
        {
            "dialect": name,
            "peak_gib": peaks[name],
            "seconds": median(times[name]),
            "over_copy": median(a / b for a, b in zip(times[name], copies[name], strict=True)),
        }
        for name in commands
    ]
    every = sorted(seconds for column in copies.values() for seconds in column)
    spread = {"copy_seconds": median(every), "fastest_copy": every[0], "slowest_copy": every[-1]}
    save_result({"checkpoint_gb": size, **spread, "rounds": ROUNDS, "rows": rows}, args.save)


if __name__ == "__main__":
    main()
