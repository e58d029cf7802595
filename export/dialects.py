"""What a dialect of ONNX ops must offer to the networks, and the choice of one by name.

A dialect is a module of plain functions; each writes its nodes into the graph and returns the value that they make.
Activations are (rows, width): the tokens or patches of the whole batch one after the other. Only attention knows which
rows belong together, from what `decoder_inputs` or `picture_inputs` gave it.
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir
from onnxscript import GraphBuilder

from export import ops_fused, ops_plain, ops_standard
from export.graph import HeadNorms, Inputs
from export.weights import Linear
from gemvg_edge.bundle import ModelShape, VisionShape
from gemvg_edge.errors import GemvgError


class Ops(Protocol):
    """The operations that the networks are written in. Shapes: x (rows, width)."""

    OPSETS: dict[str, int]
    OPSETS_WITHOUT_INT4: dict[str, int]  # which also do where there are no 4-bit codes
    GRID: bool  # whether quantised layers are the standard's DequantizeLinear, else the blocks of MatMulNBits
    PRECISIONS: tuple[str, ...]
    BATCH: int | str  # how many scenes a decoder runs at once
    NEW_CACHE: str  # "present": the cache with the new tokens in it; "new": these alone, for the engine to put there

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

    def decoder_inputs(self, g: GraphBuilder, embeds: ir.Value, shape: ModelShape, dtype: ir.DataType) -> Inputs:
        """The graph's inputs beside the embeddings (batch, tokens, width) and the cache: they say where tokens are.

        Holds `rows`, whose logits are wanted: indices into batch x tokens.
        """

    def cached_attention(
        self,
        g: GraphBuilder,
        qkv: ir.Value,
        past: tuple[ir.Value, ir.Value],
        inputs: Inputs,
        shape: ModelShape,
        norms: HeadNorms | None = None,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Causal attention over the past (key, value) and the new tokens, whose heads may be normed before.

        Returns (y, key, value), the last two as NEW_CACHE says.
        """

    def picture_inputs(
        self, g: GraphBuilder, patches: ir.Value, shape: VisionShape, dtype: ir.DataType, window: int = 0
    ) -> Inputs:
        """The graph's inputs beside the patches (pictures, patches, values): rotary rows, and with windows `valid`.

        `window` is how many patches a window has; its padding is not `valid` (pictures, patches).
        """

    def picture_attention(
        self, g: GraphBuilder, qkv: ir.Value, inputs: Inputs, shape: VisionShape, window: int = 0
    ) -> ir.Value:
        """Attention among the patches of each picture, or of each window of so many patches."""

    def activation(self, g: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
        """`quick_gelu`, `gelu` or `gelu_pytorch_tanh`."""

    def silu_times(self, g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
        """silu(gate) * up."""


def choose_dialect(name: str) -> Ops:
    """The dialect of this name."""
    match name:
        case "fused":
            return ops_fused
        case "standard":
            return ops_standard
        case "plain":
            return ops_plain
    raise GemvgError(f"unknown dialect {name!r}; use 'fused', 'standard' or 'plain'")
