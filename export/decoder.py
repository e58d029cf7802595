"""The language model as one graph for prefill and decoding, in the ops of a dialect.

Inputs: embeddings of the new tokens, where these stand with their rotary rows, the cache. Outputs: logits of the last
token, and what goes into the cache. All floats but the cache's are float32, whatever the graph computes in. The
embedding table stays outside. A token that has deepstack features (Qwen3-VL's pictures) has them side by side behind
its embedding; a layer of the first ones adds each to what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.dialects import Ops
from export.graph import FLOAT, HeadNorms, cast, node, part_of, set_output
from export.products import product
from export.weights import Linear, Scheme, WeightWriter
from gemvg_edge.bundle import ModelShape
from quantize.model_config import ModelConfig


def write_decoder(g: GraphBuilder, config: ModelConfig, weights: WeightWriter, ops: Ops, scheme: Scheme) -> None:
    """Write the whole decoder into an empty graph."""
    shape, epsilon, dtype = config.shape, config.rms_norm_eps, weights.dtype
    embeds = g.input("inputs_embeds", FLOAT, [ops.BATCH, "tokens", shape.embedding_width])
    inputs = ops.decoder_inputs(g, embeds, shape, dtype)
    pasts = [
        (_cache_input(g, ops, shape, dtype, f"past_key_{i}"), _cache_input(g, ops, shape, dtype, f"past_value_{i}"))
        for i in range(shape.layers)
    ]
    rows = cast(g, node(g.op.Reshape(embeds, [-1, shape.embedding_width])), dtype)
    residual, features = _split_features(g, rows, shape)
    y = ops.rms_norm(g, residual, weights.vector("model.layers.0.input_layernorm.weight"), epsilon)
    cache: list[ir.Value] = []
    for i, past in enumerate(pasts):
        layer = f"model.layers.{i}"
        with part_of(g, layer):
            qkv = weights.linear(
                f"{layer}.self_attn.qkv_proj",
                [f"{layer}.self_attn.{part}_proj" for part in "qkv"],
                scheme,
                bias=not config.head_norms,
            )
            norms = _head_norms(f"{layer}.self_attn", weights, epsilon) if config.head_norms else None
            y, key, value = ops.cached_attention(g, product(g, y, qkv, ops), past, inputs, shape, norms)
            cache += [key, value]
            added = features[i : i + 1]
            if i == shape.layers - 1:  # past the last attention only the rows that are asked for count
                y, residual, *added = (node(g.op.Gather(x, inputs["rows"], axis=0)) for x in (y, residual, *added))
            y = product(g, y, _linear(weights, f"{layer}.self_attn.o_proj", scheme), ops)
            norm = weights.vector(f"{layer}.post_attention_layernorm.weight")
            y, residual = ops.add_rms_norm(g, y, residual, norm, epsilon)
            for feature in added:
                residual = node(g.op.Add(residual, feature))
            y = _mlp(g, y, f"{layer}.mlp", weights, ops, scheme)
            following = f"model.layers.{i + 1}.input_layernorm" if i + 1 < shape.layers else "model.norm"
            y, residual = ops.add_rms_norm(g, y, residual, weights.vector(f"{following}.weight"), epsilon)
    head = "model.embed_tokens" if config.tied_head else "lm_head"
    logits = product(g, y, weights.linear("lm_head", [head], scheme, bias=False), ops)
    logits = cast(g, logits, FLOAT, source=dtype)
    set_output(g, logits, "logits", FLOAT, ["rows", shape.vocab_size])
    places = "capacity" if ops.NEW_CACHE == "present" else "tokens"
    for i, value in enumerate(cache):
        name = f"{ops.NEW_CACHE}_{'key' if i % 2 == 0 else 'value'}_{i // 2}"
        set_output(g, value, name, dtype, [ops.BATCH, shape.kv_heads, places, shape.head_dim])


def _split_features(g: GraphBuilder, x: ir.Value, shape: ModelShape) -> tuple[ir.Value, Sequence[ir.Value]]:
    """Embeddings (rows, hidden), and the deepstack features (rows, hidden) of each layer that adds some."""
    if not shape.deepstack:
        return x, []
    count = 1 + shape.deepstack
    embeddings, *features = g.op.Split(x, axis=-1, num_outputs=count, _outputs=count)
    return embeddings, features


def _head_norms(name: str, weights: WeightWriter, epsilon: float) -> HeadNorms:
    return HeadNorms(weights.vector(f"{name}.q_norm.weight"), weights.vector(f"{name}.k_norm.weight"), epsilon)


def _mlp(g: GraphBuilder, x: ir.Value, name: str, weights: WeightWriter, ops: Ops, scheme: Scheme) -> ir.Value:
    gate = product(g, x, _linear(weights, f"{name}.gate_proj", scheme), ops)
    up = product(g, x, _linear(weights, f"{name}.up_proj", scheme), ops)
    return product(g, ops.silu_times(g, gate, up), _linear(weights, f"{name}.down_proj", scheme), ops)


def _linear(weights: WeightWriter, name: str, scheme: Scheme) -> Linear:
    return weights.linear(name, [name], scheme, bias=False)


def _cache_input(g: GraphBuilder, ops: Ops, shape: ModelShape, dtype: ir.DataType, name: str) -> ir.Value:
    return g.input(name, dtype, [ops.BATCH, shape.kv_heads, "capacity", shape.head_dim])
