"""Small words for writing graphs: typed nodes, casts, and shapes that are known only when the graph runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import onnx_ir as ir
from onnxscript import GraphBuilder

Inputs = Mapping[str, ir.Value]  # a graph's inputs and what is computed from them once, by names of a dialect's own
FLOAT, INT32, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL


class HeadNorms(NamedTuple):
    """RMS norms of each head's queries and keys, before the rotary embedding."""

    query: ir.Value  # (head_dim)
    key: ir.Value  # (head_dim)
    epsilon: float


def node(value: Any) -> ir.Value:
    """One output, typed: the builder's ops come by attribute access."""
    assert isinstance(value, ir.Value)
    return value


@contextmanager
def part_of(g: GraphBuilder, module: str) -> Iterator[None]:
    """Nodes written inside are named after a module of the model, so that a parser's complaint says where it is."""
    g.push_module(module)
    try:
        yield
    finally:
        g.pop_module()


def cast(g: GraphBuilder, x: ir.Value, dtype: ir.DataType, source: ir.DataType = FLOAT) -> ir.Value:
    """X in another type; nothing is written where it has that type."""
    return x if dtype == source else node(g.op.Cast(x, to=dtype))


def sizes(g: GraphBuilder, x: ir.Value, start: int, end: int, *more: int) -> ir.Value:
    """A shape: dimensions start..end of x, as they are when the graph runs, and then the numbers given."""
    known = node(g.op.Shape(x, start=start, end=end))
    return node(g.op.Concat(known, list(more), axis=0)) if more else known


def permute(g: GraphBuilder, x: ir.Value, order: Sequence[int]) -> ir.Value:
    """X with its axes in this order."""
    return node(g.op.Transpose(x, perm=list(order)))


def gelu(g: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """`gelu`, or `gelu_pytorch_tanh`."""
    return node(g.op.Gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none"))


def set_output(g: GraphBuilder, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
    """Make a value an output of the graph."""
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    g.add_output(value, name)
