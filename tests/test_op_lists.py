"""What TensorRT's parsers take: our graphs do, and whatever they would not take is named by its node."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array

from export.bundle_writer import Recipe, write_bundle
from export.op_lists import LISTS, TARGETS, check_graph, newest_opset, read_op_list
from gemvg_edge.bundle import DECODER_GRAPH, DIALECTS, VISION_GRAPH
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from tests.checkpoints import GROUPED, GROUPED_2_5, GROUPED_3, write_checkpoint

GRAPHS = (VISION_GRAPH, DECODER_GRAPH)
NAMES = TARGETS["plain"]
TYPES = {name for name in TensorProto.DataType.keys() if name != "UNDEFINED"}  # noqa: SIM118  (no mapping)
KINDS = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "int4": "float32", "int8": "float16"}


SIZES = {"qwen2_vl": GROUPED, "qwen2_5_vl": GROUPED_2_5, "qwen3_vl": GROUPED_3}


@pytest.fixture(scope="module", params=SIZES)
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dialect-kind` for standard and plain and each of KINDS, and `fused-float32`; int4 with groups of 32."""
    folder = tmp_path_factory.mktemp("op_lists")
    write_checkpoint(folder / "floats", SIZES[request.param])
    for bits, group_size in ((4, 32), (8, -1)):
        options: dict[str, Any] = {"bits": bits, "vision_bits": 8, "head_bits": 8, "method": "rtn", "device": "cpu"}
        options |= {"group_size": group_size, "positive_scales": True}
        codes = Settings(folder / "floats", folder / f"int{bits}", **options)
        quantize(codes)
    for kind, precision in KINDS.items():
        checkpoint = open_checkpoint(folder / (kind if kind.startswith("int") else "floats"))
        for dialect in DIALECTS[1:]:
            write_bundle(checkpoint, folder / f"{dialect}-{kind}", Recipe(dialect, precision))
    write_bundle(open_checkpoint(folder / "floats"), folder / "fused-float32", Recipe())
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dialect", "target"), [(dialect, name) for dialect in TARGETS for name in TARGETS[dialect]])
def test_every_op_is_on_the_list(dialect: str, target: str, kind: str, bundles: Path) -> None:
    op_list = read_op_list(target)
    for graph in GRAPHS:
        path = bundles / f"{dialect}-{kind}" / graph
        assert check_graph(path, op_list) == []
        model = onnx.load(path, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}
        assert {node.op_type for node in model.graph.node} <= set(op_list.ops)
        # Blocks of int4 came with opset 21, which 10.3's document does not name.
        blocks = any(attribute.name == "block_size" for node in model.graph.node for attribute in node.attribute)
        assert newest_opset(path) <= op_list.newest_opset or (newest_opset(path), blocks) == (21, True)


def test_a_dialect_is_not_for_targets_before_it(bundles: Path) -> None:
    for folder, target, said in (
        ("standard-float32", "tensorrt_10_3", "(TensorScatter): not among the operators of TensorRT 10.3 (https://"),
        ("fused-float32", "tensorrt_11", "TensorRT 11 has no operators of com.microsoft; export with --dialect plain"),
    ):
        assert any(said in problem for problem in check_graph(bundles / folder / DECODER_GRAPH, read_op_list(target)))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_names_say_the_layer(dialect: str, bundles: Path) -> None:
    for graph, prefix, layers in ((VISION_GRAPH, "visual.blocks", None), (DECODER_GRAPH, "model.layers", 3)):
        model = onnx.load(bundles / f"{dialect}-float32" / graph, load_external_data=False)
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names), "a name is one node's"
        found = {int(match[1]) for name in names if (match := re.match(rf"{re.escape(prefix)}\.(\d+)/", name))}
        assert found == set(range(layers or max(found) + 1))
        # A layer's weights are used in the layer, but for its first norm, which is one op with the addition before.
        weight = re.compile(rf"({re.escape(prefix)}\.\d+)\.(?!norm1|input_layernorm)")
        owned = [(node.name, match[1]) for node in model.graph.node for x in node.input if (match := weight.match(x))]
        assert len(owned) > 4 * len(found)
        assert [name for name, owner in owned if not name.startswith(f"{owner}/")] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_list_says_what_it_is_of(name: str) -> None:
    content = json.loads((LISTS / f"{name}.json").read_text())
    assert content["target"] == "TensorRT " + name.removeprefix("tensorrt_").replace("_", ".")
    assert content["source"].startswith("https://")
    assert 1 <= content["opset"]["min"] < content["opset"]["max"]
    assert len(content["ops"]) > 100
    for op, types in content["ops"].items():
        assert types, f"{op} takes no type"
        assert set(types) <= TYPES, op
        assert len(set(types)) == len(types), op
    assert read_op_list(name).ops["MatMul"][:2] == ("FLOAT", "FLOAT16")


def test_each_list_is_a_target() -> None:
    assert {path.stem for path in LISTS.glob("tensorrt_[0-9]*.json")} == {*NAMES}
    assert set(TARGETS) == set(DIALECTS)


def floats(name: str, *shape: int) -> onnx.TensorProto:
    return from_array(np.ones(shape, np.float32), name)


TENSORS = [
    floats("x", 4, 4), floats("bad_scales", 4), floats("cube", 1, 2, 4, 4), floats("scales", 4), floats("cast", 4, 4),
    from_array(np.ones((4, 4), np.int8), "codes"), from_array(np.zeros(4, np.int8), "zeros"),
    from_array(np.array([1]), "axes"), from_array(np.array([3]), "lengths"), from_array(np.ones(4, np.bool_), "truths"),
]  # fmt: skip
TENSORS[1].CopyFrom(from_array(np.array([1, -1, 1, 1], np.float32), "bad_scales"))
Node = onnx.NodeProto
NODES: dict[str, tuple[Node, str | None]] = {
    "a known one": (make_node("MatMul", ["x", "x"], ["y"]), None),
    "another domain": (
        make_node("MatMulNBits", ["x", "x"], ["y"], domain="com.microsoft"),
        "TensorRT 11 has no operators of com.microsoft; export with --dialect plain or standard",
    ),
    "not on the list": (make_node("Det", ["x"], ["y"]), "not among the operators of TensorRT 11 (https://"),
    "wrong type": (make_node("Softmax", ["truths"], ["y"]), "TensorRT 11 takes FLOAT, FLOAT16, BFLOAT16, not BOOL"),
    "attention": (make_node("Attention", ["cube", "cube", "cube"], ["y"]), None),
    "attention that counts": (
        make_node("Attention", ["cube", "cube", "cube", "", "", "", "lengths"], ["y"]),
        "past_key, past_value and nonpad_kv_seqlen are not taken",
    ),
    "attention with a past": (
        make_node("Attention", ["cube", "cube", "cube", "", "cube", "cube"], ["y"]),
        "past_key, past_value and nonpad_kv_seqlen are not taken",
    ),
    "attention with a present": (
        make_node("Attention", ["cube", "cube", "cube"], ["y", "keys", "values"]),
        "only the first output is taken",
    ),
    "attention with a cap": (
        make_node("Attention", ["cube", "cube", "cube"], ["y"], softcap=2.0),
        "the attribute softcap is not taken",
    ),
    "scatter": (make_node("TensorScatter", ["cube", "cube", "axes"], ["y"], axis=-2), None),
    "scatter elsewhere": (
        make_node("TensorScatter", ["cube", "cube", "axes"], ["y"], axis=-1),
        "axis must be -2 and mode linear",
    ),
    "scatter in a ring": (
        make_node("TensorScatter", ["cube", "cube", "axes"], ["y"], mode="circular"),
        "axis must be -2 and mode linear",
    ),
    "codes": (make_node("DequantizeLinear", ["codes", "scales"], ["y"], axis=1), None),
    "a zero-point": (
        make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["y"], axis=1),
        "zero-points must be zero; leave them out",
    ),
    "no axis": (make_node("DequantizeLinear", ["codes", "scales"], ["y"]), "axis must be written out"),
    "a negative scale": (
        make_node("DequantizeLinear", ["codes", "bad_scales"], ["y"], axis=1),
        "all scales must be above zero; quantise with `python -m quantize.gptq --positive-scales`",
    ),
    "a norm": (make_node("LayerNormalization", ["x", "scales"], ["y"]), None),
    "a norm's mean": (
        make_node("LayerNormalization", ["x", "scales"], ["y", "mean", "inverse"]),
        "only the first output is taken",
    ),
    "constant axes": (make_node("ReduceMean", ["x", "axes"], ["y"]), None),
    **{
        f"computed axes of {op}": (make_node(op, ["x", "made"], ["y"]), "axes must be a constant")
        for op in ("ReduceMean", "ReduceMax", "ReduceSum", "Squeeze", "Unsqueeze")
    },
}


@pytest.mark.parametrize("case", NODES)
def test_what_would_not_parse_is_named(case: str, tmp_path: Path) -> None:
    node, said = NODES[case]
    node.name = "model.layers.1/odd"
    made = make_node("Add", ["axes", "axes"], ["made"], name="made")
    output = make_tensor_value_info("made", TensorProto.INT64, [1])
    graph = onnx.helper.make_graph([made, node], "odd", [], [output], TENSORS)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 24), ("com.microsoft", 1))]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), tmp_path / "odd.onnx")
    problems = check_graph(tmp_path / "odd.onnx", read_op_list("tensorrt_11"))
    if said is None:
        assert problems == []
    else:
        (problem,) = problems
        assert problem.startswith(f"odd.onnx: node 'model.layers.1/odd' ({node.op_type}): {said}")


INSERTED: dict[str, Callable[[onnx.GraphProto], Any]] = {
    "a foreign domain": lambda graph: graph.node[5].MergeFrom(Node(domain="com.example")),
    "a foreign op": lambda graph: graph.node[5].MergeFrom(Node(op_type="Unique")),
}


@pytest.mark.parametrize("case", INSERTED)
def test_one_wrong_node_among_ours_is_found(case: str, bundles: Path, tmp_path: Path) -> None:
    model = onnx.load(bundles / "plain-float32" / DECODER_GRAPH, load_external_data=False)
    INSERTED[case](model.graph)
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, tmp_path / DECODER_GRAPH)
    (problem,) = check_graph(tmp_path / DECODER_GRAPH, read_op_list("tensorrt_10_3"))
    assert problem.startswith(f"decoder.onnx: node {model.graph.node[5].name!r}")


def test_a_type_that_a_target_lacks_is_found(bundles: Path) -> None:
    op_list = read_op_list("tensorrt_10_3")
    narrow = replace(op_list, ops={op: tuple(t for t in types if t != "FLOAT16") for op, types in op_list.ops.items()})
    assert check_graph(bundles / "plain-float32" / DECODER_GRAPH, narrow) == []
    problems = check_graph(bundles / "plain-float16" / DECODER_GRAPH, narrow)
    assert any("(MatMul): TensorRT 10.3 takes" in said and said.endswith("not FLOAT16") for said in problems)


def test_what_is_no_graph_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "odd.onnx").write_bytes(b"none")
    with pytest.raises(GemvgError, match=r"odd.onnx is not an ONNX graph \(.*\); export the bundle again"):
        check_graph(tmp_path / "odd.onnx", read_op_list("tensorrt_11"))


def dequantize_a_product(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "DequantizeLinear")
    graph.node.insert(0, make_node("Mul", 2 * [node.input[1]], ["squares"]))
    node.input[1] = "squares"


def take_an_input(graph: onnx.GraphProto) -> None:
    del next(node for node in graph.node if node.op_type == "DequantizeLinear").input[1:]


def read_elsewhere(graph: onnx.GraphProto) -> None:
    for entry in (entry for tensor in graph.initializer for entry in tensor.external_data):
        if entry.key == "location":
            entry.value = "../../../../etc/passwd"


DAMAGED: dict[str, tuple[Callable[[onnx.GraphProto], None], str]] = {
    "no stored scales": (dequantize_a_product, r"DequantizeLinear_node_\d+' dequantises what is no stored weight"),
    "an input too few": (take_an_input, r"decoder.onnx does not hold together \(.*\); export the bundle again"),
    "another file": (read_elsewhere, r"q.*_proj.scales cannot be read \(.*passwd.*\); export the bundle again"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_graph_is_one_sentence(case: str, bundles: Path, tmp_path: Path) -> None:
    damage, said = DAMAGED[case]
    model = onnx.load(bundles / "standard-int4" / DECODER_GRAPH, load_external_data=False)
    damage(model.graph)
    onnx.save(model, tmp_path / DECODER_GRAPH)
    with pytest.raises(GemvgError, match=said):
        check_graph(tmp_path / DECODER_GRAPH, read_op_list("tensorrt_11"))
