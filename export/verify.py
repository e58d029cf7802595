"""A bundle against its checkpoint in PyTorch, and its graphs against what the targets' parsers take; no GPU is needed.

    python -m export.verify BUNDLE --against CHECKPOINT

Pictures of several sizes and prompts about them go through both: PyTorch reads a whole sequence at once without a
cache, the bundle encodes, prefills and takes 32 steps on its cache, scene by scene and, where its graphs have the axis,
all scenes as one batch. Prints the largest difference of each output. The last line is JSON; exit code 1 past the
tolerance, or with a node that a target of the dialect would not parse, which is named.

Kernels of quantised layers round activations to 8 bits by default. The verdict is on the same graphs with that switched
off, where differences are those of arithmetic; with it on they are reported beside. Graphs for TensorRT in float16 and
bfloat16 are computed as its kernels do, every value rounded (rounded.py). Where TensorRT-RTX is installed, two layers
of these are compiled, and what the engine does is printed: kernels, what is fused, bytes moved.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.engine_check import read_shortened
from export.engine_reading import as_json
from export.op_lists import TARGETS, check_graph, newest_opset, read_op_list
from export.reference import Case, load_reference, open_same_model, run_reference, same_codes
from export.verify_runs import exact_engines, is_rounded, make_cases, run_batch, run_bundle
from gemvg_edge.bundle import DECODER_GRAPH, VISION_GRAPH, Bundle, open_bundle
from gemvg_edge.command import run_command
from gemvg_edge.engines.finite import NotFiniteError
from gemvg_edge.engines.protocol import CacheT, Decoder, Floats, VisionTower
from gemvg_edge.errors import GemvgError
from train.hub import checkpoint_folder

# Of float32, absolute. Of the others in standard deviations of the output: float16's last digit is 1e-3 of a number,
# bfloat16's 8e-3, and every layer adds some.
TOLERANCES = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25}

Differences = dict[str, float]


def verify(bundle: Bundle, checkpoint: Path, base: Path | None = None) -> dict[str, Any]:
    """The last line's content: what does not parse, and the largest difference of each kind of output.

    `base` as in open_checkpoint.
    """
    manifest = bundle.manifest
    problems = check_targets(bundle)
    opened = open_same_model(bundle, checkpoint, base)
    for_engines = TARGETS[manifest.dialect] and manifest.precision != "float32"  # that is for checking the arithmetic
    engines = read_shortened(bundle) if for_engines and not problems else {}
    model = load_reference(bundle, opened)
    cases = make_cases(bundle)
    expected = [run_reference(model, case, manifest.model.image_token_id) for case in cases]
    del model
    exact, shipped = measure(bundle, cases, expected)
    tolerance = TOLERANCES[manifest.precision] if same_codes(bundle, opened) else None
    passed: bool | None = False if problems else None
    largest = max(exact.values())
    print(_verdict(largest, tolerance))
    if tolerance is not None:
        passed = not problems and largest <= tolerance
    return {
        **_finite(exact),
        **({} if shipped is None else {"with_8_bit_activations": _finite(shipped)}),
        "tolerance": tolerance,
        "passed": passed,
        "unparsed": problems,
        "engines": {name: [as_json(reading) for reading in profiles] for name, profiles in engines.items()},
        "targets": [read_op_list(name).target for name in TARGETS[manifest.dialect]],
        "dialect": manifest.dialect,
        "precision": manifest.precision,
        "weights": dict(manifest.weights),
    }


def _verdict(largest: float, tolerance: float | None) -> str:
    if tolerance is None:
        return (
            f"not judged: the codes are not this checkpoint's (largest difference {largest:.2g}); give the quantised "
            "checkpoint that the bundle was exported from, or compare boxes with bench.accuracy"
        )
    verdict = "within" if largest <= tolerance else "NOT within"
    return f"the largest difference, {largest:.2g}, is {verdict} the tolerance of {tolerance:g}"


def check_targets(bundle: Bundle) -> list[str]:
    """Every node that a target of the bundle's dialect would not parse; says what was checked."""
    problems = []
    for name in TARGETS[bundle.manifest.dialect]:
        op_list = read_op_list(name)
        for graph in (VISION_GRAPH, DECODER_GRAPH):
            found = check_graph(bundle.path(graph), op_list)
            problems += found
            opset = newest_opset(bundle.path(graph))
            past = f"; opset {opset} is past the {op_list.newest_opset} of that document" * (
                opset > op_list.newest_opset
            )
            print(f"{graph}: {len(found)} nodes that {op_list.target} would not parse{past}")
    for problem in problems:
        print(problem)
    return problems


def measure(
    bundle: Bundle, cases: Sequence[Case], expected: Sequence[tuple[list[Floats], Floats]]
) -> tuple[Differences, Differences | None]:
    """The largest differences with exact activations and, where kernels round these, as the bundle runs."""
    relative = bundle.manifest.precision != "float32"
    with tempfile.TemporaryDirectory() as folder:
        seen, vision, decoder, session = exact_engines(bundle, Path(folder))
        exact = compare(seen, vision, decoder, cases, expected, relative)
        if bundle.manifest.dialect != "fused":
            ours = run_batch(seen, session, cases, [features for features, _ in expected])
            exact["batch"] = max(
                largest_difference(ours[:, k], logits, relative) for k, (_, logits) in enumerate(expected)
            )
            print(f"{len(cases)} scenes as one batch:  {exact['batch']:.2e}")
    codes = any(what.startswith("int") for part, what in bundle.manifest.weights.items() if part != "embedding")
    if is_rounded(bundle) or not codes:  # TensorRT's kernels unpack codes to floats, and round no activations
        return exact, None
    from gemvg_edge.engines.onnxruntime import OnnxDecoder, OnnxVisionTower

    print("with activations rounded to 8 bits, as it runs:")
    return exact, compare(bundle, OnnxVisionTower(bundle), OnnxDecoder(bundle), cases, expected, relative)


def compare(
    bundle: Bundle,
    vision: VisionTower,
    decoder: Decoder[CacheT],
    cases: Sequence[Case],
    expected: Sequence[tuple[list[Floats], Floats]],
    relative: bool,
) -> Differences:
    """The largest difference of each kind of output over all scenes."""
    worst = {"vision": 0.0, "prefill": 0.0, "decode": 0.0}
    for case, (features, logits) in zip(cases, expected, strict=True):
        try:
            ours, our_logits = run_bundle(bundle, vision, decoder, case)
        except NotFiniteError as error:
            print(f"{case.name}:  {error}")
            return dict.fromkeys(worst, np.inf)
        found = {
            "vision": max(largest_difference(a, b, relative) for a, b in zip(ours, features, strict=True)),
            "prefill": largest_difference(our_logits[0], logits[0], relative),
            "decode": largest_difference(our_logits[1:], logits[1:], relative),
        }
        print(f"{case.name}:  " + "  ".join(f"{kind} {value:.2e}" for kind, value in found.items()))
        worst = {kind: max(worst[kind], found[kind]) for kind in worst}
    return worst


def largest_difference(ours: Floats, theirs: Floats, relative: bool = False) -> float:
    """The largest absolute difference, or in standard deviations of theirs.

    A NaN counts as infinite, since it would pass every comparison.
    """
    difference = float(np.abs(ours - theirs).max()) / (float(theirs.std()) if relative else 1.0)
    return difference if np.isfinite(difference) else np.inf


def _finite(differences: Differences) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {kind: value if np.isfinite(value) else None for kind, value in differences.items()}


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where the bundle fails or could not be judged, 2 for bad input."""
    return run_command("export.verify", lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m export.verify", description=__doc__, formatter_class=raw)
    parser.add_argument("bundle", type=Path, help="the bundle folder to check, one of graphs")
    against = "the checkpoint or adapter folder, or hub id, that it was exported from (required)"
    parser.add_argument("--against", type=Path, required=True, metavar="CHECKPOINT", help=against)
    belongs = "of an adapter: the checkpoint that it belongs to, or its hub id (default: the one that it names)"
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help=belongs)
    given = parser.parse_args(arguments)
    bundle = open_bundle(given.bundle)
    if bundle.manifest.tensorrt:
        raise GemvgError(f"{bundle.folder} holds TensorRT engines; verify the bundle that they were built from")
    base = given.base and checkpoint_folder(given.base)
    result = verify(bundle, checkpoint_folder(given.against), base)
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
