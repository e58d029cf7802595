"""A matrix product that may be given a single row: a decode step is one, and so is the token of a tiny picture."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.dialects import Ops
from export.graph import FLOAT, cast, node
from export.weights import GridLinear, Linear


def product(g: GraphBuilder, x: ir.Value, layer: Linear, ops: Ops) -> ir.Value:
    """X @ weight + bias of a layer that may be given a single row.

    TensorRT dequantises 8-bit codes with a scale an output inside the product of two rows or more; for a single row it
    writes the whole weight out as floats first, 5 bytes moved for each one stored. So such a layer always gets a row
    more, of zeros, which is dropped again. Read in programs of TensorRT-RTX 1.7: docs/devices.md.
    """
    if not (isinstance(layer, GridLinear) and layer.block_size == 0):
        return ops.linear(g, x, layer)
    zero = cast(g, node(g.op.Constant(value_float=0.0)), layer.scales.dtype or FLOAT)
    zeros = node(g.op.Expand(zero, [1, layer.inputs]))
    y = ops.linear(g, node(g.op.Concat(x, zeros, axis=0)), layer)
    return node(g.op.Slice(y, [0], [-1], [0]))
