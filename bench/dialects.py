"""Every dialect of every model against PyTorch: how far outputs differ, and what the targets' parsers would refuse.

    python -m bench.dialects [--folder data/dialects] [--save bench/results/dialects.json]

Four models: the small one of this repository, and three random ones of two layers of each kind at the true widths of
Qwen2-VL-7B, Qwen2.5-VL-7B and Qwen3-VL-8B (a cut vocabulary). Each in float32, and quantised to int4 and int8 (rounded
to nearest: only the export is on trial). What is compared is export.verify's. Needs 12 GB of disk and 8 GB of memory,
which are freed again. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.random_checkpoint import (
    QWEN2_5_VL_7B_WIDE,
    QWEN2_VL_7B_WIDE,
    QWEN3_VL_8B_WIDE,
    write_random_checkpoint,
)
from bench.results import result_file, save_result
from export.bundle_writer import Recipe
from export.reference import load_reference, open_same_model, run_reference
from export.to_onnx import export
from export.verify import TOLERANCES, check_targets, measure
from export.verify_runs import make_cases
from gemvg_edge.bundle import DIALECTS, open_bundle
from gemvg_edge.command import command
from quantize.gptq import Settings, quantize
from train.output_folder import WORK, marked

SMALL = Path("checkpoints/tabletop")
WIDE = {
    "qwen2-vl, 7B wide": QWEN2_VL_7B_WIDE,
    "qwen2.5-vl, 7B wide": QWEN2_5_VL_7B_WIDE,
    "qwen3-vl, 8B wide": QWEN3_VL_8B_WIDE,
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int4": {"bits": 4, "vision_bits": 8, "head_bits": 8, "embedding_bits": 8},
    "int8": {"bits": 8, "group_size": -1, "vision_bits": 8, "head_bits": 8, "embedding_bits": 8},
}


def checkpoints(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """Name, folder and group size of int4 of each model, made when it is asked for and then taken away."""
    yield "tabletop", SMALL, 32
    for name, config in WIDE.items():
        write_random_checkpoint(folder / "wide", config)
        yield name, folder / "wide", 128
        shutil.rmtree(folder / "wide")


def compare(model: str, weights: str, checkpoint: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each dialect; PyTorch's side runs once."""
    expected = None
    for dialect in DIALECTS:
        print(f"{model}, {weights}, {dialect}:", flush=True)
        export(checkpoint, folder / "bundle", Recipe(dialect))
        bundle = open_bundle(folder / "bundle", check_hashes=False)  # just written
        cases = make_cases(bundle)
        if expected is None:
            reference = load_reference(bundle, open_same_model(bundle, checkpoint))
            expected = [run_reference(reference, case, bundle.manifest.model.image_token_id) for case in cases]
            del reference
        problems = check_targets(bundle)
        found, as_shipped = measure(bundle, cases, expected)
        passed = not problems and max(found.values()) <= TOLERANCES["float32"]
        rounded = None if as_shipped is None else max(as_shipped.values())
        yield {"model": model, "weights": weights, "dialect": dialect, **found, "unparsed": len(problems),
               "with_8_bit_activations": rounded, "passed": passed}  # fmt: skip
        shutil.rmtree(folder / "bundle")


@command("bench.dialects")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.dialects", description="Differences of all dialects to PyTorch.")
    place = "the folder to work in, taken away at the end (default: %(default)s)"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", default=Path("data/dialects"), help=place)
    saved = "keep the JSON here too, such as bench/results/dialects.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with marked(args.folder, {"format": WORK}) as folder:
        for model, checkpoint, group_size in checkpoints(folder):
            for weights, options in WEIGHTS.items():
                source = checkpoint
                if options:
                    source = folder / weights
                    rounding: dict[str, Any] = {
                        "method": "rtn",
                        "positive_scales": True,
                        "device": "cpu",
                        "group_size": group_size,
                        **options,
                    }
                    quantize(Settings(checkpoint, source, **rounding))
                rows += compare(model, weights, source, folder)
                if options:
                    shutil.rmtree(source)
    save_result({"tolerance": TOLERANCES["float32"], "rows": rows}, args.save)


if __name__ == "__main__":
    main()
