"""Half floats computed on a CPU as a GPU's kernels round them: against onnx's own evaluator, a plain twin of attention,
and a deep model whose residual stream reaches real models' range.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ml_dtypes import bfloat16
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from export.bundle_writer import Recipe, write_bundle
from export.reference import load_reference, open_same_model, run_reference
from export.rounded import AT_ONCE, rounded
from export.verify import TOLERANCES, measure
from export.verify_runs import make_cases
from gemvg_edge.bundle import DECODER_GRAPH, VISION_GRAPH, open_bundle
from quantize.checkpoint import open_checkpoint
from tests.checkpoints import GROUPED, GROUPED_2_5, write_checkpoint

HALVES = {"float16": np.float16, "bfloat16": bfloat16}
# Largest difference from float32 in the output's standard deviations: bfloat16 has 8 binary digits, float16 11.
DIFFERENCES = {"float16": (1e-4, 0.02), "bfloat16": (1e-3, 0.15)}
LENGTHS = {"batch": 2, "tokens": 5, "capacity": 9, "slots": 9, "rows": 2, "pictures": 2, "patches": 16}


def random_inputs(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Two scenes' tokens behind a past of three, or two pictures; caches in the graph's own type."""
    rng = np.random.default_rng(0)
    known = {
        "places": np.tile(np.arange(3, 8), (2, 1)), "slots": np.arange(9), "rows": np.array([4, 9]),
        "valid": np.ones((2, 16), np.bool_),
    }  # fmt: skip
    inputs = {}
    for value in graph.input:
        tensor = value.type.tensor_type
        shape = [dim.dim_value or LENGTHS[dim.dim_param] for dim in tensor.shape.dim]
        floats = rng.standard_normal(shape).astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        inputs[value.name] = known.get(value.name, floats)
    return inputs


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, inputs)[0]
    return found


@pytest.mark.parametrize("sizes", [GROUPED, GROUPED_2_5], ids=["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("dialect", ["standard", "plain"])
def test_what_is_rounded_is_what_onnx_computes(dialect: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """The evaluator of the onnx package rounds after every operator too, but inside attention in ways of its own."""
    write_checkpoint(tmp_path / "checkpoint", sizes)
    for precision in ("float32", *HALVES):
        write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / precision, Recipe(dialect, precision))
    for graph in (VISION_GRAPH, DECODER_GRAPH):
        plain = onnx.load(tmp_path / "float32" / graph)
        exact = run(plain, random_inputs(plain.graph))
        for precision, (least, most) in DIFFERENCES.items():
            model = onnx.load(tmp_path / precision / graph)
            evaluated: Any = ReferenceEvaluator(model).run(None, random_inputs(model.graph))
            wide = rounded(model, precision)
            ours = run(wide, random_inputs(wide.graph))
            theirs = np.asarray(evaluated[0], np.float32)
            for found, wanted in ((ours, exact), (theirs, exact), (ours, theirs)):
                assert least < np.abs(found - wanted).max() / exact.std() < most


def attention_by_hand(query: Any, key: Any, value: Any, mask: Any, precision: str, scale: float) -> np.ndarray:
    """The plain twin: one head, every sum as the kernels have it."""
    half = HALVES[precision]

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if precision == "bfloat16":
            return np.asarray(a @ b)
        total = np.zeros((len(a), b.shape[1]), np.float32)
        for start in range(0, a.shape[1], AT_ONCE):
            part = a[:, start : start + AT_ONCE] @ b[start : start + AT_ONCE]
            total = (total + part).astype(np.float16).astype(np.float32)
        return total

    root = np.float32(scale**0.5)
    q, k = ((x * root).astype(half).astype(np.float32) for x in (query, key))
    scores = np.where(mask, product(q, k.T), np.float32(-1e30))
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares = (shares / shares.sum(axis=1, keepdims=True)).astype(half).astype(np.float32)
    found: np.ndarray = product(shares, value).astype(half).astype(np.float32)
    return found


@pytest.mark.parametrize(("precision", "most"), [("float16", 2e-3), ("bfloat16", 1.6e-2)])
def test_attention_sums_as_the_kernels_do(precision: str, most: float) -> None:
    """Four heads over two of keys and values, past the places that a query sees; a digit apart where sums tie."""
    half, heads, kv_heads, tokens, places, dim = HALVES[precision], 4, 2, 5, 37, 24
    kind = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[precision]
    shapes = {"query": [1, heads, tokens, dim], "past_key_0": [1, kv_heads, places, dim]}
    shapes |= {"values": shapes["past_key_0"]}
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [1, 1, tokens, places]))
    node = helper.make_node("Attention", ["query", "past_key_0", "values", "mask"], ["y"], "a", scale=dim**-0.5)
    outputs = [helper.make_tensor_value_info("y", kind, shapes["query"])]
    graph = helper.make_graph([node], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    rng = np.random.default_rng(0)
    arrays = {n: (8 * rng.standard_normal(s)).astype(half).astype(np.float32) for n, s in shapes.items()}
    mask = np.arange(places) <= np.arange(places - tokens, places)[:, None]
    found = run(rounded(model, precision), {**arrays, "mask": mask[None, None]})
    query, keys, values = (arrays[name][0] for name in shapes)
    by_hand = np.stack([
        attention_by_hand(query[h], keys[h // 2], values[h // 2], mask, precision, dim**-0.5) for h in range(heads)
    ])  # fmt: skip
    scale = np.abs(by_hand).max()
    assert np.abs(found[0] - by_hand).max() / scale <= most
    assert np.mean(found[0] == by_hand) > 0.95


LAYERS, WIDTH, GROWTH = 28, 256, 1.3


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many layers as Qwen2-VL has, each adding to the residual stream a share of what is there, up to 3,000."""
    text = {
        **GROUPED["text_config"], "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12],
        },
    }  # fmt: skip
    vision = {**GROUPED["vision_config"], "hidden_size": WIDTH}
    folder = tmp_path_factory.mktemp("deep") / "checkpoint"
    model = write_checkpoint(folder, {**GROUPED, "text_config": text, "vision_config": vision})
    largest = 0.0

    def watch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, float((output[0] if isinstance(output, tuple) else output).abs().max()))

    with torch.no_grad():
        for k, layer in enumerate(model.model.language_model.layers):
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.mul_(0.5 * GROWTH**k)
            layer.register_forward_hook(watch)
        model.save_pretrained(folder)
        model(input_ids=torch.arange(3, 103)[None])
    assert 2000 < largest < 6000, largest
    return folder


@pytest.mark.parametrize("precision", HALVES)
def test_a_deep_model_stays_within_the_tolerance(precision: str, deep: Path, tmp_path: Path) -> None:
    write_bundle(open_checkpoint(deep), tmp_path / "bundle", Recipe("standard", precision))
    bundle = open_bundle(tmp_path / "bundle")
    reference, cases = load_reference(bundle, open_same_model(bundle, deep)), make_cases(bundle)
    expected = [run_reference(reference, case, bundle.manifest.model.image_token_id) for case in cases]
    differences, _ = measure(bundle, cases, expected)
    assert TOLERANCES[precision] / 10 < max(differences.values()) <= TOLERANCES[precision]
