"""Which operators a bundle's graph may have."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export.bundle_writer import Recipe, write_bundle
from gemvg_edge.bundle import DECODER_GRAPH, DIALECTS, VISION_GRAPH
from gemvg_edge.engines.graph_ops import KNOWN, check_operators
from gemvg_edge.errors import GemvgError
from gemvg_edge.models import DEFAULT_BUNDLE
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from tests.checkpoints import GROUPED, GROUPED_2_5, GROUPED_3, write_checkpoint


def operators(path: Path) -> set[str]:
    """As the onnx package reads them."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in nodes}


def test_those_of_every_export_are_known(tmp_path: Path) -> None:
    """And no others: the list has none that nothing needs."""
    found = set()
    for name, sizes in (("qwen2_vl", GROUPED), ("qwen2_5_vl", GROUPED_2_5), ("qwen3_vl", GROUPED_3)):
        floats, codes = tmp_path / name / "floats", tmp_path / name / "codes"
        write_checkpoint(floats, sizes)
        quantize(
            Settings(floats, codes, 4, 32, vision_bits=8, head_bits=8, embedding_bits=8, method="rtn", device="cpu")
        )
        for checkpoint, dialect, precision in itertools.product((floats, codes), DIALECTS, ("float32", "float16")):
            bundle = tmp_path / name / f"{checkpoint.name}-{dialect}-{precision}"
            write_bundle(open_checkpoint(checkpoint), bundle, Recipe(dialect, precision))
            for graph in (VISION_GRAPH, DECODER_GRAPH):
                check_operators(bundle / graph)
                found |= operators(bundle / graph)
    found |= operators(DEFAULT_BUNDLE / VISION_GRAPH) | operators(DEFAULT_BUNDLE / DECODER_GRAPH)
    assert found == KNOWN


def loop() -> onnx.ModelProto:
    scalar = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])], "body",
        [scalar("i", TensorProto.INT64, []), scalar("go", TensorProto.BOOL, []), scalar("x", TensorProto.FLOAT, [1])],
        [scalar("on", TensorProto.BOOL, []), scalar("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    nodes = [helper.make_node("Loop", ["times", "", "start"], ["end"], body=body)]
    return helper.make_model(helper.make_graph(nodes, "loop", [scalar("start", TensorProto.FLOAT, [1])], []))


def test_a_loop_is_refused(tmp_path: Path) -> None:
    onnx.save(loop(), tmp_path / "decoder.onnx")
    with pytest.raises(GemvgError, match=r"decoder\.onnx is not an ONNX graph \(it has a graph within its graph\)"):
        check_operators(tmp_path / "decoder.onnx")


def test_functions_and_foreign_operators_are_refused(tmp_path: Path) -> None:
    model = onnx.load(DEFAULT_BUNDLE / DECODER_GRAPH, load_external_data=False)
    model.functions.add(name="Mine", domain="mine")
    onnx.save(model, tmp_path / "decoder.onnx")
    with pytest.raises(GemvgError, match="it has functions of its own"):
        check_operators(tmp_path / "decoder.onnx")
    del model.functions[:]
    model.graph.node[3].op_type = "ConstantOfShape"
    onnx.save(model, tmp_path / "decoder.onnx")
    with pytest.raises(
        GemvgError, match=r"has the operator 'com\.microsoft\.ConstantOfShape', which no graph of ours has"
    ):
        check_operators(tmp_path / "decoder.onnx")


def test_half_a_graph_is_one_sentence(tmp_path: Path) -> None:
    whole = (DEFAULT_BUNDLE / DECODER_GRAPH).read_bytes()
    for content in (whole[: len(whole) // 2], b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f", whole[:-1], b"\x3c"):
        (tmp_path / "decoder.onnx").write_bytes(content)
        with pytest.raises(GemvgError, match="is not an ONNX graph"):
            check_operators(tmp_path / "decoder.onnx")
