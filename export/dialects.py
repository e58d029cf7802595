"""What a dialect of ONNX ops must offer to vision.py and decoder.py, and the choice of one by name.

A dialect is a module of plain functions; each writes its nodes into the graph and returns the value that they make.
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir
from onnxscript import GraphBuilder

from export import ops_fused
from export.weights import Linear
from gemvg_edge.bundle import ModelShape
from gemvg_edge.errors import GemvgError


class Ops(Protocol):
    """The operations that the networks are written in. Shapes: x (batch, tokens, width)."""

    OPSETS: dict[str, int]

    def linear(self, g: GraphBuilder, x: ir.Value, layer: Linear) -> ir.Value:
        """X @ weight + bias."""

    def rms_norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        """Root-mean-square norm."""

    def add_rms_norm(
        self, g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of x + residual, x + residual)."""

    def layer_norm(self, g: GraphBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float) -> ir.Value:
        """Layer norm."""

    def add_layer_norm(
        self, g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """(norm of x + residual, x + residual)."""

    def cached_attention(
        self,
        g: GraphBuilder,
        qkv: ir.Value,
        past: tuple[ir.Value, ir.Value],
        where: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
        shape: ModelShape,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal attention over the past (key, value); `where` is (total - 1, total, cos, sin), a row for each place.

        Returns (y, key, value), the last two with the new tokens in them.
        """

    def picture_attention(self, g: GraphBuilder, qkv: ir.Value, cos: ir.Value, sin: ir.Value, heads: int) -> ir.Value:
        """Full attention among the patches of each picture of the batch, rotary rows (patches, head_dim / 2)."""

    def activation(self, g: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """`quick_gelu` or `gelu`."""

    def silu_times(self, g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
        """silu(gate) * up."""


def choose_dialect(name: str) -> Ops:
    """The dialect of this name."""
    match name:
        case "fused":
            return ops_fused
    raise GemvgError(f"unknown dialect {name!r}; use 'fused'")
