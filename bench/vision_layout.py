"""Pictures grouped by shape against one ragged sequence: which way the vision tower is faster on this machine.

    python -m bench.vision_layout [--save bench/results/vision_layout.json]

Grouped is what the runtime does: pictures of one patch grid form a batch, and no mask is needed. Ragged is the same
graph with all patches in one sequence and an additive mask that keeps attention inside each picture. The tower has
Qwen2-VL's true widths, four layers and random float32 weights. Both must agree before they are timed, in turns. Ends
with one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx

from bench.random_checkpoint import QWEN2_VL_2B, write_random_checkpoint
from bench.results import result_file, save_result
from export.to_onnx import export
from gemvg_edge.bundle import VISION_GRAPH, Bundle, open_bundle
from gemvg_edge.command import command, whole_number
from gemvg_edge.engines.onnxruntime import OnnxVisionTower
from gemvg_edge.engines.protocol import Floats
from gemvg_edge.images import Grid
from gemvg_edge.positions import vision_table

ATTENTION_BIAS = 5  # among MultiHeadAttention's inputs
TOLERANCE = 2e-3  # float32 sums in another order, on tokens of the order of 1
# (height, width) in patches of 14 pixels.
SCENES: dict[str, tuple[tuple[int, int], ...]] = {
    "one, 448 x 448": ((32, 32),),
    "two, 448 x 448": ((32, 32), (32, 32)),
    "four, 448 x 448": ((32, 32),) * 4,
    "two, 448 x 448 and 448 x 336": ((32, 32), (32, 24)),
    "four of four shapes": ((32, 32), (32, 24), (24, 32), (16, 40)),
    "eight of eight small shapes": ((8, 8), (8, 10), (10, 8), (8, 12), (12, 8), (10, 10), (8, 14), (14, 8)),
}


def ragged_tower(bundle: Bundle) -> Callable[[Sequence[Floats], Sequence[Grid]], Floats]:
    """The bundle's vision graph with a mask in every attention: (patches, grids) -> all tokens (tokens, hidden)."""
    model = onnx.load(bundle.path(VISION_GRAPH), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MultiHeadAttention":
            node.input.extend([""] * (ATTENTION_BIAS - len(node.input)) + ["bias"])
    shape: list[str | int | None] = [1, 1, "patches", "patches"]
    model.graph.input.append(onnx.helper.make_tensor_value_info("bias", onnx.TensorProto.FLOAT, shape))
    # Beside the original, where its weights lie.
    path = bundle.path("vision_ragged.onnx")
    onnx.save(model, path)
    import onnxruntime  # after our engine, which keeps it from reporting to its makers

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    vision, merge = bundle.manifest.model.vision, bundle.manifest.preprocessing.merge_size

    def encode(patches: Sequence[Floats], grids: Sequence[Grid]) -> Floats:
        tables = [vision_table(grid, merge, vision.head_dim, vision.rope_theta) for grid in grids]
        picture = np.repeat(np.arange(len(grids)), [len(p) for p in patches])
        inputs = {
            "patches": np.concatenate(patches)[None],
            "cos": np.concatenate([table.cos for table in tables]),
            "sin": np.concatenate([table.sin for table in tables]),
            "bias": np.where(picture[:, None] == picture, 0, np.float32(-1e9))[None, None],
        }
        tokens: Floats = session.run(["tokens"], inputs)[0][0]
        return tokens

    return encode


def compare(bundle: Bundle, repeats: int) -> list[dict[str, str | float]]:
    """Medians of both ways, taken in turns, for every scene."""
    grouped, ragged = OnnxVisionTower(bundle), ragged_tower(bundle)
    numbers = bundle.manifest.preprocessing
    patch_dim = 3 * numbers.temporal_patch_size * numbers.patch_size**2
    rng = np.random.default_rng(0)
    rows: list[dict[str, str | float]] = []
    for name, shapes in SCENES.items():
        grids = [(1, height, width) for height, width in shapes]
        patches = [rng.standard_normal((h * w, patch_dim)).astype(np.float32) for _, h, w in grids]
        difference = float(np.abs(np.concatenate(grouped.encode(patches, grids)) - ragged(patches, grids)).max())
        assert difference <= TOLERANCE, f"{name}: grouped and ragged differ by {difference}"
        times: list[tuple[float, float]] = []
        for _ in range(repeats):
            start = time.perf_counter()
            grouped.encode(patches, grids)
            middle = time.perf_counter()
            ragged(patches, grids)
            times.append((middle - start, time.perf_counter() - middle))
        grouped_ms, ragged_ms = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        rows.append({"pictures": name, "grouped_ms": grouped_ms, "ragged_ms": ragged_ms, "ragged_over_grouped": ratio})
        print(f"{name:<32} grouped {grouped_ms:8.1f} ms   ragged {ragged_ms:8.1f} ms   ratio {ratio:.2f}")
    return rows


@command("bench.vision_layout")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m bench.vision_layout", description="Grouped or ragged pictures in the vision tower."
    )
    repeats = "timed runs of each way (default: %(default)s)"
    parser.add_argument("--repeats", type=whole_number, metavar="N", default=9, help=repeats)
    saved = "keep the JSON here too, such as bench/results/vision_layout.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    config = QWEN2_VL_2B | {"num_hidden_layers": 1, "vocab_size": 2048}
    config["vision_config"] = config["vision_config"] | {"depth": 4}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, target = Path(folder, "checkpoint"), Path(folder, "bundle")
        write_random_checkpoint(checkpoint, config)
        export(checkpoint, target)
        rows = compare(open_bundle(target), args.repeats)
    save_result({"tower": "Qwen2-VL widths, 4 layers, float32, random weights", "rows": rows}, args.save)


if __name__ == "__main__":
    main()
