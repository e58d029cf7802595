"""Peak memory of quantising and exporting a Qwen2-VL-2B-shaped checkpoint, and of grounding two pictures with it.

    python -m bench.memory [--folder data/qwen2-vl-2b] [--save bench/results/memory.json]

Both run as whole processes; the peak is the operating system's (maximum resident set, mapped files included). Weights
are random, so the boxes mean nothing. Needs about 7 GB of disk, which is freed at the end. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from bench.results import result_file, save_result
from gemvg_edge.command import command
from train.output_folder import WORK, marked

SAMPLES = 32  # calibration prompts
# Hidden width, inner width and width of keys of a decoder layer; both models have 28.
LAYER_2B, LAYER_7B = (1536, 8960, 256), (3584, 18944, 512)


def layer_work(hidden: int, inner: int, keys: int, tokens: int) -> float:
    """Multiplications of quantising one decoder layer: two forward passes, four Hessians and their factors, solving.

    A factor takes a Cholesky decomposition, an inverse from it and a second decomposition: n^3 / 6 + n^3 / 3 + n^3 / 6.
    """
    weights = hidden * (2 * hidden + 2 * keys + 3 * inner)
    sides = (hidden, hidden, hidden, inner)
    hessians = sum(tokens * side**2 + 2 / 3 * side**3 for side in sides)
    solving = hidden * (2 * hidden + 2 * keys + 2 * inner) * hidden / 2 + hidden * inner * inner / 2
    return 2 * tokens * weights + hessians + solving


def peak_of(command: list[str]) -> tuple[float, float]:
    """Run a command; (peak resident GiB, seconds). A command that fails ends the benchmark.

    A child's peak starts at its parent's size when it was forked, so this process must stay small itself.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"{' '.join(command)}: exit code {code}")
    return usage.ru_maxrss / 2**20, time.perf_counter() - started


@command("bench.memory")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.memory", description="Peak memory of export and grounding at Qwen2-VL-2B's size."
    )
    place = "the folder to work in, taken away at the end (default: %(default)s)"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", default=Path("data/qwen2-vl-2b"), help=place)
    saved = "keep the JSON here too, such as bench/results/memory.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    with marked(args.folder, {"format": WORK}) as folder:
        checkpoint, bundle = folder / "checkpoint", folder / "bundle"
        peak_of([sys.executable, "-m", "bench.random_checkpoint", str(checkpoint)])
        quantized = folder / "int4"
        options = ["--group-size", "128", "--samples", str(SAMPLES)]
        quantize_gib, quantize_seconds = peak_of(
            [sys.executable, "-m", "quantize.gptq", "--model", str(checkpoint), "--out", str(quantized), *options]
        )
        record = json.loads((quantized / "quantization.json").read_text(encoding="utf-8"))
        layer_seconds, tokens = record["seconds_a_layer"], record["tokens"]
        export_gib, export_seconds = peak_of(
            [sys.executable, "-m", "export.to_onnx", str(checkpoint), str(bundle), "--weights", "int4"]
        )
        rng = np.random.default_rng(0)
        pictures = []
        for name in ("a", "b"):
            pictures.append(str(folder / f"{name}.png"))
            Image.fromarray(rng.integers(0, 256, (448, 448, 3), dtype=np.uint8)).save(pictures[-1])
        ask = ["ground", *pictures, "--query", "the mug", "--bundle", str(bundle)]
        ground_gib, ground_seconds = peak_of([sys.executable, "-m", "gemvg_edge.cli", *ask])
        sizes = {
            "checkpoint_gb": sum(f.stat().st_size for f in checkpoint.iterdir()) / 1e9,
            "bundle_gb": sum(f.stat().st_size for f in bundle.iterdir()) / 1e9,
        }
    save_result(
        {
            "model": "Qwen2-VL-2B shape, random weights",
            **sizes,
            "quantize_peak_gib": quantize_gib,
            "quantize_seconds": quantize_seconds,
            "quantize_samples": SAMPLES,
            "quantize_tokens": tokens,
            "quantize_layer_seconds": layer_seconds,
            "quantize_layer_seconds_7b": layer_seconds * layer_work(*LAYER_7B, tokens) / layer_work(*LAYER_2B, tokens),
            "export_peak_gib": export_gib,
            "export_seconds": export_seconds,
            "ground_peak_gib": ground_gib,
            "ground_seconds": ground_seconds,
        },
        args.save,
    )


if __name__ == "__main__":
    main()
