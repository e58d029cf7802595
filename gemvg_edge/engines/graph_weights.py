"""The layers of a bundle's `fused` graph, read without the onnx package: what an engine of our own needs of it.

A bundle may be a stranger's: operators must come in the order in which export writes a network of the manifest's
shape, and every tensor must lie within a file of the bundle. Knows no engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import FILES, Bundle, ModelShape
from gemvg_edge.engines.protobuf import contents, fields, varints
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable, read_bytes

FIX = "copy or export the bundle again"
TYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    7: np.dtype("<i8"),
}  # TensorProto.DataType, as far as we write it
SHAPING = frozenset(("Cast", "Concat", "Constant", "Gather", "Reshape", "Shape", "Split"))  # compute nothing
PRODUCTS = ("Gemm", "MatMulNBits")
# Fields by their numbers in onnx.proto.
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5


class Unsupported(GemvgError):
    """The graph is in order, but holds what only ONNX Runtime computes."""


@dataclass
class Node:
    """One operator."""

    kind: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: dict[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tensor:
    """Where the numbers of an initializer lie."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def read(self) -> npt.NDArray[Any]:
        """The numbers, in memory of their own."""
        count = math.prod(self.shape)
        numbers = np.fromfile(self.path, self.dtype, count, offset=self.offset)
        if len(numbers) != count:
            raise GemvgError(f"{printable(self.path)} is shorter than its graph says; {FIX}")
        return numbers.reshape(self.shape)


@dataclass(frozen=True)
class Layer:
    """A linear layer as the graph has it: floats, or codes in blocks along the inputs."""

    outputs: int
    inputs: int
    bits: int  # 0 for floats
    block: int
    weight: Tensor  # (outputs, inputs) floats, or (outputs, blocks, block * bits / 8) uint8
    scales: Tensor | None  # (outputs, blocks)
    bias: Tensor | None  # (outputs)
    order: Tensor | None  # (inputs): which input each column stands for


@dataclass(frozen=True)
class Norm:
    """A norm's weight, its bias where it centres, and what is added to the variance."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float


@dataclass(frozen=True)
class Network:
    """All layers in the order of their use, and the activation of the blocks."""

    layers: Sequence[Layer]
    norms: Sequence[Norm]
    activation: str  # "QuickGelu" or "Gelu"


def read_network(bundle: Bundle, graph: str, wanted: Sequence[str]) -> Network:
    """The layers of a graph whose computing operators must be `wanted`, which has PRODUCTS[0] for any product.

    "Activation" stands for one of the tower's. GemvgError for a graph that is none, Unsupported for one that differs.
    """
    path = bundle.path(graph)
    try:
        nodes, tensors = _parse(read_bytes(path), bundle)
        return _network(nodes, tensors, wanted)
    except (ValueError, KeyError, OverflowError) as error:
        raise GemvgError(f"{printable(path)} is not a graph of ours ({str(error)[:200]}); {FIX}") from None


def vision_operators(depth: int) -> list[str]:
    """What export/vision.py writes for Qwen2-VL."""
    product = PRODUCTS[0]
    attention = [product, "RotaryEmbedding", "RotaryEmbedding", "MultiHeadAttention", product, "SkipLayerNormalization"]
    block = [*attention, product, "Activation", product, "SkipLayerNormalization"]
    return [product, "LayerNormalization", *block * depth, product, "Gelu", product]


def decoder_operators(shape: ModelShape) -> list[str]:
    """What export/decoder.py writes."""
    product, norm = PRODUCTS[0], "SkipSimplifiedLayerNormalization"
    layer = [product, "GroupQueryAttention", product, norm, product, product, "QuickGelu", "Mul", product, norm]
    return ["SimplifiedLayerNormalization", *layer * shape.layers, product]


def _network(nodes: Sequence[Node], tensors: Mapping[str, Tensor], wanted: Sequence[str]) -> Network:
    computing = [node for node in nodes if node.kind not in SHAPING and node.kind != "ArgMax"]
    kinds = [PRODUCTS[0] if node.kind in PRODUCTS else node.kind for node in computing]
    activations = {kind for kind, want in zip(kinds, wanted, strict=False) if want == "Activation"}
    named = [min(activations) if want == "Activation" and activations else want for want in wanted]
    if kinds != named or not activations <= {"QuickGelu", "Gelu"}:
        raise Unsupported("its operators are not those of a Qwen2-VL that export writes")
    orders = {node.outputs[0]: node.inputs[1] for node in nodes if node.kind == "Gather" and node.inputs[1] in tensors}
    layers = [_layer(node, tensors, orders) for node in computing if node.kind in PRODUCTS]
    norms = [_norm(node, tensors) for node in computing if node.kind.endswith("LayerNormalization")]
    for node in computing:
        if node.kind == "QuickGelu" and not math.isclose(
            node.attributes.get("alpha", 0), 1.0 if "Mul" in kinds else 1.702, rel_tol=1e-6
        ):
            raise Unsupported("its QuickGelu is of another sharpness")
    return Network(layers, norms, min(activations, default=""))


def _layer(node: Node, tensors: Mapping[str, Tensor], orders: Mapping[str, str]) -> Layer:
    names = [*node.inputs, *[""] * 6][:6]
    weight = tensors[names[1]]
    if node.kind == "Gemm":
        outputs, inputs = _expect(weight, 2, "<f4")
        bits, block, scales, bias = 0, 1, None, names[2]
        if node.attributes.get("transB") != 1:
            raise Unsupported("a product's weights are not transposed")
    else:
        outputs, inputs, bits, block = (int(node.attributes[name]) for name in ("N", "K", "bits", "block_size"))
        if names[3] or names[4]:
            raise Unsupported("its codes have zero-points of their own")
        if bits not in (4, 8) or not 16 <= block <= 2**16 or block & (block - 1) or not 0 < inputs <= 2**20:
            raise ValueError(f"codes of {bits} bits in blocks of {block}")
        scales, bias = tensors[names[2]], names[5]
        blocks = -(-inputs // block)
        if _expect(scales, 2, "<f4") != (outputs, blocks):
            raise ValueError(f"{names[2]} has the shape {scales.shape}")
        if _expect(weight, 3, "u1") != (outputs, blocks, block * bits // 8):
            raise ValueError(f"{names[1]} has the shape {weight.shape}")
    order = tensors[orders[names[0]]] if names[0] in orders else None
    if order is not None and _expect(order, 1, "<i8") != (inputs,):
        raise ValueError(f"{orders[names[0]]} has the shape {order.shape}")
    biases = tensors[bias] if bias else None
    if biases is not None and _expect(biases, 1, "<f4") != (outputs,):
        raise ValueError(f"{bias} has the shape {biases.shape}")
    return Layer(outputs, inputs, bits, block, weight, scales, biases, order)


def _norm(node: Node, tensors: Mapping[str, Tensor]) -> Norm:
    at = 2 if node.kind.startswith("Skip") else 1
    centres = "Simplified" not in node.kind
    weight, bias = tensors[node.inputs[at]], tensors[node.inputs[at + 1]] if centres else None
    width = _expect(weight, 1, "<f4")
    if bias is not None and _expect(bias, 1, "<f4") != width:
        raise ValueError(f"{node.inputs[at + 1]} has the shape {bias.shape}")
    return Norm(weight, bias, float(node.attributes["epsilon"]))


def _expect(tensor: Tensor, dims: int, dtype: str) -> tuple[int, ...]:
    if len(tensor.shape) != dims or tensor.dtype != np.dtype(dtype):
        raise ValueError(
            f"a tensor of {tensor.dtype} with the shape {tensor.shape} where it needs {dims} dimensions of {dtype}"
        )
    return tensor.shape


def _parse(model: bytes, bundle: Bundle) -> tuple[list[Node], dict[str, Tensor]]:
    nodes: list[Node] = []
    tensors: dict[str, Tensor] = {}
    for number, graph in contents(model):
        for part, value in contents(graph) if number == _GRAPH else ():
            if part == _NODE:
                nodes.append(_node(value))
            elif part == _INITIALIZER and (found := _tensor(value, bundle)):
                tensors[found[0]] = found[1]
    return nodes, tensors


def _node(message: memoryview) -> Node:
    node = Node()
    for number, value in contents(message):
        if number in (1, 2):
            (node.inputs if number == 1 else node.outputs).append(bytes(value).decode())
        elif number == 4:
            node.kind = bytes(value).decode()
        elif number == 5:
            name, number_of = "", None
            for inner, content in fields(value):
                if inner == 1 and isinstance(content, memoryview):
                    name = bytes(content).decode()
                elif inner == 2 and isinstance(content, memoryview):
                    number_of = float(np.frombuffer(content, "<f4")[0])
                elif inner == 3 and isinstance(content, int):
                    number_of = content
            if number_of is not None:
                node.attributes[name] = number_of
    return node


def _tensor(message: memoryview, bundle: Bundle) -> tuple[str, Tensor] | None:
    """An initializer that lies in a file; None for the small ones in the graph, which are shapes."""
    name, kind = "", 0
    dims: list[int] = []
    place: dict[str, str] = {}
    for number, value in fields(message):
        if number == 1:
            dims += varints(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number == 13 and isinstance(value, memoryview):
            entry = {inner: bytes(content).decode() for inner, content in contents(value)}
            place[entry.get(1, "")] = entry.get(2, "")
    if not place:
        return None
    location, offset, length = place.get("location", ""), int(place.get("offset", "0")), int(place["length"])
    if location not in FILES or kind not in TYPES:
        raise ValueError(f"{name[:80]} lies in {location[:80]!r}, as type {kind}")
    size = math.prod(dims) * TYPES[kind].itemsize
    if size != length or offset < 0 or offset + length > bundle.manifest.files[location].bytes:
        raise ValueError(f"{name[:80]} is not within {location}")
    return name, Tensor(bundle.path(location), offset, TYPES[kind], tuple(dims))
