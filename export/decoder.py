"""The language model as one graph for prefill and decoding, in the ops of a dialect.

Inputs: embeddings of the new tokens, how many tokens there are with them, rotary rows of every place, the cache.
Outputs: logits of the last token and the extended cache. The embedding table stays outside.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.dialects import Ops
from export.weights import Linear, Scheme, WeightWriter
from gemvg_edge.bundle import ModelShape
from quantize.model_config import ModelConfig

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def write_decoder(g: GraphBuilder, config: ModelConfig, weights: WeightWriter, ops: Ops, scheme: Scheme) -> None:
    """Write the whole decoder into an empty graph."""
    shape, epsilon = config.shape, config.rms_norm_eps
    x = g.input("inputs_embeds", FLOAT, [1, "tokens", shape.hidden_size])
    where = (
        g.input("seqlens_k", INT32, [1]),  # total - 1
        g.input("total", INT32, []),
        g.input("cos", FLOAT, ["capacity", shape.head_dim // 2]),
        g.input("sin", FLOAT, ["capacity", shape.head_dim // 2]),
    )
    pasts = [
        (_cache_input(g, shape, f"past_key_{i}"), _cache_input(g, shape, f"past_value_{i}"))
        for i in range(shape.layers)
    ]
    presents: list[ir.Value] = []
    residual, y = x, ops.rms_norm(g, x, weights.vector("model.layers.0.input_layernorm.weight"), epsilon)
    for i, past in enumerate(pasts):
        layer = f"model.layers.{i}"
        qkv = weights.linear(
            f"{layer}.self_attn.qkv_proj", [f"{layer}.self_attn.{part}_proj" for part in "qkv"], scheme, bias=True
        )
        y, key, value = ops.cached_attention(g, ops.linear(g, y, qkv), past, where, shape)
        presents += [key, value]
        if i == shape.layers - 1:  # past the last attention only the last token counts
            y, residual = _last_token(g, y), _last_token(g, residual)
        y = ops.linear(g, y, _linear(weights, f"{layer}.self_attn.o_proj", scheme))
        norm = weights.vector(f"{layer}.post_attention_layernorm.weight")
        y, residual = ops.add_rms_norm(g, y, residual, norm, epsilon)
        y = _mlp(g, y, f"{layer}.mlp", weights, ops, scheme)
        following = f"model.layers.{i + 1}.input_layernorm" if i + 1 < shape.layers else "model.norm"
        y, residual = ops.add_rms_norm(g, y, residual, weights.vector(f"{following}.weight"), epsilon)
    head = "model.embed_tokens" if config.tied_head else "lm_head"
    logits = ops.linear(g, y, weights.linear("lm_head", [head], scheme, bias=False))
    _set_output(g, logits, "logits", [1, 1, shape.vocab_size])
    for i, present in enumerate(presents):
        name = f"present_{'key' if i % 2 == 0 else 'value'}_{i // 2}"
        _set_output(g, present, name, [1, shape.kv_heads, "capacity", shape.head_dim])


def _mlp(g: GraphBuilder, x: ir.Value, name: str, weights: WeightWriter, ops: Ops, scheme: Scheme) -> ir.Value:
    gate = ops.linear(g, x, _linear(weights, f"{name}.gate_proj", scheme))
    up = ops.linear(g, x, _linear(weights, f"{name}.up_proj", scheme))
    return ops.linear(g, ops.silu_times(g, gate, up), _linear(weights, f"{name}.down_proj", scheme))


def _linear(weights: WeightWriter, name: str, scheme: Scheme) -> Linear:
    return weights.linear(name, [name], scheme, bias=False)


def _last_token(g: GraphBuilder, x: ir.Value) -> ir.Value:
    last: ir.Value = g.op.Gather(x, g.op.Constant(value_ints=[-1]), axis=1)  # (1, tokens, width) -> (1, 1, width)
    return last


def _cache_input(g: GraphBuilder, shape: ModelShape, name: str) -> ir.Value:
    return g.input(name, FLOAT, [1, shape.kv_heads, "capacity", shape.head_dim])


def _set_output(g: GraphBuilder, value: ir.Value, name: str, shape: list[int | str]) -> None:
    value.type, value.shape = ir.TensorType(FLOAT), ir.Shape(shape)
    g.add_output(value, name)
