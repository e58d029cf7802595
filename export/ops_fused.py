"""The `fused` dialect: com.microsoft ops of ONNX Runtime, one kernel for what is several ops in the standard.

Knows ops, not networks. `export.dialects.Ops` says what each function is for.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.weights import BlockLinear, DenseLinear, Linear
from gemvg_edge.bundle import ModelShape

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy level: activations are rounded to 8 bits in blocks too


def linear(g: GraphBuilder, x: ir.Value, layer: Linear) -> ir.Value:
    """X @ weight + bias."""
    match layer:
        case DenseLinear(weight, None):
            return _node(g.op.MatMul(x, weight))
        case DenseLinear(weight, bias):
            return _node(g.op.Add(g.op.MatMul(x, weight), bias))
        case BlockLinear(packed, scales, zeros, bias, inputs, outputs, scheme):
            return _node(
                _fused(g).MatMulNBits(
                    x, packed, scales, *_until_last(zeros, None, bias), K=inputs, N=outputs,
                    bits=scheme.bits, block_size=scheme.block_size, accuracy_level=INT8_ACTIVATIONS,
                )
            )  # fmt: skip


def rms_norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """Root-mean-square norm."""
    return _node(g.op.SimplifiedLayerNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1))


def add_rms_norm(
    g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + residual, x + residual)."""
    y, _, _, total = _fused(g).SkipSimplifiedLayerNormalization(x, residual, weight, _outputs=4, epsilon=epsilon)
    return y, total


def layer_norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float) -> ir.Value:
    """Layer norm."""
    return _node(g.op.LayerNormalization(x, weight, bias, axis=-1, epsilon=epsilon))


def add_layer_norm(
    g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, bias: ir.Value, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + residual, x + residual)."""
    y, _, _, total = _fused(g).SkipLayerNormalization(x, residual, weight, bias, _outputs=4, epsilon=epsilon)
    return y, total


def cached_attention(
    g: GraphBuilder,
    qkv: ir.Value,
    past: tuple[ir.Value, ir.Value],
    where: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    shape: ModelShape,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Causal attention over the cache; with one row a token, do_rotary serves mRoPE's 3-D positions unchanged."""
    y, key, value = _fused(g).GroupQueryAttention(
        qkv, None, None, *past, *where, _outputs=3,
        num_heads=shape.heads, kv_num_heads=shape.kv_heads, do_rotary=1, scale=shape.head_dim**-0.5,
    )  # fmt: skip
    return y, key, value


def picture_attention(g: GraphBuilder, qkv: ir.Value, cos: ir.Value, sin: ir.Value, heads: int) -> ir.Value:
    """Full attention among the patches of each picture of the batch; without a mask the flash kernel serves it."""
    query, key, value = g.op.Split(qkv, axis=-1, num_outputs=3, _outputs=3)  # each (B, n, width)
    first = g.op.Constant(value_ints=[0])  # rows are taken from the first on
    query, key = (_fused(g).RotaryEmbedding(x, first, cos, sin) for x in (query, key))
    return _node(_fused(g).MultiHeadAttention(query, key, value, num_heads=heads))


def activation(g: GraphBuilder, x: ir.Value, name: str) -> ir.Value:
    """`quick_gelu` or `gelu`."""
    return _node(_fused(g).QuickGelu(x, alpha=1.702) if name == "quick_gelu" else g.op.Gelu(x, approximate="none"))


def silu_times(g: GraphBuilder, gate: ir.Value, up: ir.Value) -> ir.Value:
    """silu(gate) * up; QuickGelu with alpha 1 is SiLU in one kernel."""
    return _node(g.op.Mul(_fused(g).QuickGelu(gate, alpha=1.0), up))


def _until_last(*inputs: ir.Value | None) -> list[ir.Value | None]:
    """Optional inputs without the absent ones at the end."""
    present = [k for k, value in enumerate(inputs) if value is not None]
    return list(inputs[: present[-1] + 1]) if present else []


def _fused(g: GraphBuilder) -> Any:
    return g.opset(MICROSOFT)


def _node(value: Any) -> ir.Value:
    # The builder's ops come by attribute access, so they are untyped.
    assert isinstance(value, ir.Value)
    return value
