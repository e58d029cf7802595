"""What the graphs of a bundle take and give, by its manifest, held against what a graph itself says.

A bundle may be a stranger's: no buffer is made by its manifest's numbers before the graphs agree with them. Knows no
engine but the shape of ONNX Runtime's descriptions of inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemvg_edge.bundle import Manifest
from gemvg_edge.errors import GemvgError

CHANNELS = 3
FIX = "copy or export the bundle again"
FLOAT, INT64, INT32, BOOL = "tensor(float)", "tensor(int64)", "tensor(int32)", "tensor(bool)"
STORED = {"float32": FLOAT, "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}  # of keys and values

# Element type and dimensions; None is one that a run decides.
Tensors = Mapping[str, tuple[str, tuple[int | None, ...]]]


def vision_contract(manifest: Manifest) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of the vision tower's graph."""
    numbers, shape = manifest.preprocessing, manifest.model.vision
    patch = CHANNELS * numbers.temporal_patch_size * numbers.patch_size**2
    rows = (FLOAT, (None, shape.head_dim // 2))
    inputs: dict[str, tuple[str, tuple[int | None, ...]]] = {"patches": (FLOAT, (None, None, patch)), "cos": rows}
    inputs |= {"sin": rows}
    if shape.window:
        inputs["valid"] = (BOOL, (None, None))
    if shape.place_side:
        inputs |= {"place_index": (INT64, (None, 4)), "place_weight": (FLOAT, (None, 4))}
    return inputs, {"tokens": (FLOAT, (None, None, manifest.model.embedding_width))}


def decoder_contract(manifest: Manifest) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of the decoder's graph."""
    shape, fused = manifest.model, manifest.dialect == "fused"
    half = shape.head_dim // 2
    embeds = FLOAT, (None, None, shape.embedding_width)
    inputs: dict[str, tuple[str, tuple[int | None, ...]]] = {"inputs_embeds": embeds}
    if fused:
        inputs |= dict.fromkeys(("cos", "sin"), (FLOAT, (None, half)))
        inputs |= {"seqlens_k": (INT32, (None,)), "total": (INT32, ())}
    else:
        inputs |= dict.fromkeys(("cos", "sin"), (FLOAT, (None, None, half)))
        inputs |= {"places": (INT64, (None, None)), "slots": (INT64, (None,)), "rows": (INT64, (None,))}
    cache = (STORED[manifest.precision], (None, shape.kv_heads, None, shape.head_dim))
    names = [f"{part}_{layer}" for layer in range(shape.layers) for part in ("key", "value")]
    inputs |= {f"past_{name}": cache for name in names}
    outputs: dict[str, tuple[str, tuple[int | None, ...]]] = {"logits": (FLOAT, (None, shape.vocab_size))}
    written = "new" if manifest.dialect == "plain" else "present"
    return inputs, outputs | {f"{written}_{name}": cache for name in names}


def check_contract(path: Path, session: Any, contract: tuple[Tensors, Tensors]) -> None:
    """GemvgError where an ONNX Runtime session has other inputs or outputs than the manifest says."""
    for kind, found, wanted in (
        ("input", session.get_inputs(), contract[0]),
        ("output", session.get_outputs(), contract[1]),
    ):
        described = {one.name: (one.type, one.shape) for one in found}
        if odd := sorted(set(described) ^ set(wanted)):
            has = "has" if odd[0] in described else "lacks"
            raise GemvgError(f"{path} {has} the {kind} {odd[0]!r}, unlike what the manifest says; {FIX}")
        for name, (element, dims) in wanted.items():
            if described[name][0] != element or not _fits(described[name][1], dims):
                raise GemvgError(
                    f"{path}: the {kind} {name!r} is {described[name][0]} {described[name][1]}, by the manifest "
                    f"{element} {list(dims)}; {FIX}"
                )


def _fits(found: Sequence[Any], wanted: Sequence[int | None]) -> bool:
    """Where the manifest has a number, the graph has the same; elsewhere it is free, or fixed to what runs use: 1."""
    return len(found) == len(wanted) and all(
        theirs == ours if ours is not None else not isinstance(theirs, int) or theirs == 1
        for theirs, ours in zip(found, wanted, strict=True)
    )
