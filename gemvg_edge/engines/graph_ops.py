"""The operators of a bundle's ONNX graph, read without the onnx package, held against those that export writes.

A bundle may be a stranger's, and a loop in its graph may never end. Reads ONNX's protocol buffers
(https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) no further than names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemvg_edge.engines.protobuf import contents
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable, read_bytes

FIX = "copy or export the bundle again"
# None runs another graph, so that each runs once; tests/test_op_lists.py has every graph of ours.
KNOWN = frozenset((
    "Add", "Attention", "Cast", "Concat", "Constant", "DequantizeLinear", "Div", "Expand", "Gather",
    "Gelu", "Gemm", "LayerNormalization", "Less", "LessOrEqual", "MatMul", "Mul", "RMSNormalization", "ReduceMean",
    "Reshape", "RotaryEmbedding", "Shape", "Sigmoid", "SimplifiedLayerNormalization", "Slice", "Softmax", "Split",
    "Sqrt", "Sub", "TensorScatter", "Tile", "Transpose", "Unsqueeze", "Where",
    "com.microsoft.GroupQueryAttention", "com.microsoft.MatMulNBits", "com.microsoft.MultiHeadAttention",
    "com.microsoft.QuickGelu", "com.microsoft.RotaryEmbedding", "com.microsoft.SkipLayerNormalization",
    "com.microsoft.SkipSimplifiedLayerNormalization",
))  # fmt: skip

# Fields by their numbers in onnx.proto, of the model, its graph, a node and an attribute.
_GRAPH, _FUNCTIONS, _NODE, _OP_TYPE, _ATTRIBUTE, _DOMAIN, _SUBGRAPH, _SUBGRAPHS = 7, 25, 1, 4, 5, 7, 6, 11
_INPUT = 1  # of a node


def check_operators(path: Path) -> None:
    """GemvgError for a graph with an operator that export never writes."""
    if unknown := sorted(operators_of(path) - KNOWN):
        raise GemvgError(f"{printable(path)} has the operator {unknown[0][:80]!r}, which no graph of ours has; {FIX}")


def adds_bias_to_codes(path: Path) -> bool:
    """Whether a MatMulNBits of the graph has a bias, its sixth input. Asked after `check_operators`."""
    for node in _nodes(read_bytes(path)):
        kinds = [bytes(value) for number, value in node if number == _OP_TYPE]
        inputs = [bytes(value) for number, value in node if number == _INPUT]
        if kinds == [b"MatMulNBits"] and any(inputs[5:]):
            return True
    return False


def _nodes(model: bytes) -> Iterator[list[tuple[int, memoryview]]]:
    """The fields of each node; ValueError says what is wrong."""
    for number, graph in contents(model):
        if number == _FUNCTIONS:
            raise ValueError("it has functions of its own")
        for _, node in (field for field in contents(graph) if field[0] == _NODE) if number == _GRAPH else ():
            yield list(contents(node))


def operators_of(path: Path) -> set[str]:
    """Names of a graph's operators; GemvgError for a file that is none, or with graphs within, which may never end."""
    try:
        return _operators(read_bytes(path))
    except ValueError as error:
        raise GemvgError(f"{printable(path)} is not an ONNX graph ({error}); {FIX}") from None


def _operators(model: bytes) -> set[str]:
    """Names of all operators, those of other domains than ONNX's with their domain; ValueError says what is wrong."""
    found = set()
    for parts in _nodes(model):
        for _, attribute in (part for part in parts if part[0] == _ATTRIBUTE):
            if any(inner in (_SUBGRAPH, _SUBGRAPHS) for inner, _ in contents(attribute)):
                raise ValueError("it has a graph within its graph")
        names = {number: bytes(value).decode() for number, value in parts if number in (_OP_TYPE, _DOMAIN)}
        domain = names.get(_DOMAIN, "")
        kind = names.get(_OP_TYPE, "")
        found.add(kind if domain in ("", "ai.onnx") else f"{domain}.{kind}")
    return found
