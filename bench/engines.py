"""What TensorRT would do: engines of full-sized graphs, compiled by TensorRT-RTX without a GPU, and read.

    python -m bench.engines [--folder data/engines] [--save bench/results/engines.json]

Qwen2-VL-2B whole, and two layers at the widths of Qwen2-VL-7B and Qwen3-VL-8B with their whole vocabularies, random
weights, quantised as docs/howto/tensorrt.md recommends. Each engine is built in a process of its own, whose peak memory
is held against what was predicted before. Nothing runs: kernels, bytes and scratch are read in the compiled programs.
Needs 16 GB of disk and 8 GB of memory, which are freed again. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.random_checkpoint import QWEN2_VL_2B, QWEN2_VL_7B_WIDE, QWEN3_VL_8B_WIDE, write_random_checkpoint
from bench.results import result_file, save_result
from bench.tables.engines import engines as table
from export.bundle_writer import Recipe
from export.to_onnx import export
from gemvg_edge.command import command
from gemvg_edge.errors import GemvgError
from quantize.gptq import Settings, quantize
from train.output_folder import WORK, marked

VOCABULARY_7B = 152_064
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B": QWEN2_VL_2B,
    "Qwen2-VL-7B, two layers": QWEN2_VL_7B_WIDE | {"vocab_size": VOCABULARY_7B},
    "Qwen3-VL-8B, two layers": QWEN3_VL_8B_WIDE | {
        "text_config": QWEN3_VL_8B_WIDE["text_config"] | {"vocab_size": 151_936}
    },
}  # fmt: skip
RECOMMENDED: dict[str, Any] = {"vision_bits": 8, "head_bits": 8, "embedding_bits": 8, "positive_scales": True}
BUILD = "import sys; from bench.fit.engine_build import build; build(*sys.argv[1:])"
KINDS = (("standard", "bfloat16"), ("standard", "float16"), ("plain", "bfloat16"))


def engines(model: str, config: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of one model: both engines of every dialect and precision."""
    write_random_checkpoint(folder / "floats", config)
    quantize(Settings(folder / "floats", folder / "codes", method="rtn", device="cpu", **RECOMMENDED))
    shutil.rmtree(folder / "floats")
    for dialect, precision in KINDS:
        export(folder / "codes", folder / "bundle", Recipe(dialect, precision))
        for index in range(2):
            work = folder / "engine"
            work.mkdir()
            child = [sys.executable, "-c", BUILD, str(folder / "bundle"), str(index), str(work)]
            done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(work)
            row = {"model": model, "dialect": dialect, "precision": precision, **row}
            said = f"{row['peak_gib']:.2f} GiB at most, {row['predicted_gib']:.2f} predicted"
            print(f"{model}, {dialect}, {precision}, {row['engine']}: {said}", flush=True)
            yield row
        shutil.rmtree(folder / "bundle")
    shutil.rmtree(folder / "codes")


@command("bench.engines")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.engines", description="What TensorRT-RTX makes of the graphs.")
    place = "the folder to work in, taken away at the end (default: %(default)s)"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", default=Path("data/engines"), help=place)
    some = "the models to build (default: all)"
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help=some)
    saved = "keep the JSON here too, such as bench/results/engines.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    try:
        import tensorrt_rtx_bindings as rtx
    except ImportError as error:
        raise GemvgError(f"TensorRT-RTX cannot be imported ({error}); pip install tensorrt-rtx-cu12, on x86") from None
    rows: list[dict[str, Any]] = []
    with marked(args.folder, {"format": WORK}) as folder:
        for model in args.models:
            rows += engines(model, MODELS[model], folder)
    result = {"compiler": f"TensorRT-RTX {rtx.__version__}", "rows": rows}
    print(table(result))
    save_result(result, args.save)


if __name__ == "__main__":
    main()
