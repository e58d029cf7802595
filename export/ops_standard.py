"""The `standard` dialect: ONNX opset 24 and nothing else, which TensorRT 10.15 and 11 parse into fused layers.

Attention gets its mask as an input of its own: TensorRT takes no `nonpad_kv_seqlen`, and where the causal frontier lies
beside a cache was corrected in the standard only later (onnx 1.23). The cache is updated in place by TensorScatter
where past and present are one buffer. What no opset-24 op does better is `plain`'s.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from export import ops_plain
from export.graph import BOOL, HeadNorms, Inputs, node, permute, sizes
from gemvg_edge.bundle import ModelShape, VisionShape

OPSETS = OPSETS_WITHOUT_INT4 = {"": 24}
GRID = True
PRECISIONS = ops_plain.PRECISIONS
BATCH: int | str = "batch"
NEW_CACHE = "present"

linear = ops_plain.linear
layer_norm, add_layer_norm = ops_plain.layer_norm, ops_plain.add_layer_norm
activation, silu_times = ops_plain.activation, ops_plain.silu_times


def rms_norm(g: GraphBuilder, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """Root-mean-square norm, its mean in float32."""
    return node(g.op.RMSNormalization(x, weight, axis=-1, epsilon=epsilon, stash_type=1))


def add_rms_norm(
    g: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    """(norm of x + residual, x + residual)."""
    total = node(g.op.Add(x, residual))
    return rms_norm(g, total, weight, epsilon), total


def decoder_inputs(g: GraphBuilder, embeds: ir.Value, shape: ModelShape, dtype: ir.DataType) -> Inputs:
    """Where the new tokens stand, and which places each of them sees."""
    inputs = ops_plain.token_inputs(g, embeds, shape, dtype, "slots")
    places = inputs["places"]
    seen = g.op.LessOrEqual(inputs["slots"], g.op.Unsqueeze(places, [1, 3]))
    return inputs | {
        "mask": node(seen),  # (batch, 1, tokens, slots)
        "seen": sizes(g, inputs["slots"], 0, 1),
        "first": node(g.op.Gather(places, 0, axis=1)),  # (batch): where the new tokens begin
    }


def cached_attention(
    g: GraphBuilder,
    qkv: ir.Value,
    past: tuple[ir.Value, ir.Value],
    inputs: Inputs,
    shape: ModelShape,
    norms: HeadNorms | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Causal attention over the cache, into which the new keys and values are put before."""
    qkv = permute(g, node(g.op.Reshape(qkv, inputs["heads"])), (0, 2, 1, 3))  # (batch, heads + 2 kv, tokens, head_dim)
    query, key, value = g.op.Split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], axis=1, _outputs=3)
    if norms:
        query, key = rms_norm(g, query, norms.query, norms.epsilon), rms_norm(g, key, norms.key, norms.epsilon)
    query, key = (g.op.RotaryEmbedding(x, inputs["cos"], inputs["sin"]) for x in (query, key))
    keys, values = (
        node(g.op.TensorScatter(cache, new, inputs["first"], axis=-2))
        for cache, new in zip(past, (key, value), strict=True)
    )
    # The cache has one length for ever; what is attended to ends where `slots` does. Where these are as many, TensorRT
    # leaves the slices out and reads the cache where it lies; where not, it copies them, and attends to the few key/
    # value heads as they are, which it would otherwise write out for every head.
    attended = (node(g.op.Slice(x, [0], inputs["seen"], [2])) for x in (keys, values))
    y = node(g.op.Attention(query, *attended, inputs["mask"], scale=shape.head_dim**-0.5))
    return node(g.op.Reshape(permute(g, y, (0, 2, 1, 3)), [-1, shape.heads * shape.head_dim])), keys, values


def picture_inputs(
    g: GraphBuilder, patches: ir.Value, shape: VisionShape, dtype: ir.DataType, window: int = 0
) -> Inputs:
    """Rotary rows of the patches, and which patches of a padded picture are any."""
    inputs = ops_plain.patch_inputs(g, patches, shape, dtype)
    rows = sizes(g, patches, 0, 2, shape.head_dim // 2)  # the op wants a table for each picture
    inputs |= {name: node(g.op.Expand(inputs[name], rows)) for name in ("cos", "sin")}
    if window:
        valid = g.input("valid", BOOL, ["pictures", "patches"])
        patch_count = sizes(g, patches, 1, 2)
        square = node(g.op.Concat([1, 1], patch_count, [1], axis=0))  # a mask has a row for each query
        inputs["mask"] = node(g.op.Expand(g.op.Unsqueeze(valid, [1, 2]), square))  # (pictures, 1, patches, patches)
        inputs["mask in windows"] = node(g.op.Expand(g.op.Reshape(valid, [-1, 1, 1, window]), [1, 1, window, 1]))
    return inputs


def picture_attention(g: GraphBuilder, qkv: ir.Value, inputs: Inputs, shape: VisionShape, window: int = 0) -> ir.Value:
    """Attention among the patches of each picture or window."""
    heads, head_dim = shape.heads, shape.head_dim
    qkv = permute(g, node(g.op.Reshape(qkv, inputs["heads"])), (0, 2, 1, 3))  # (pictures, 3 x heads, patches, head_dim)
    query, key, value = g.op.Split(qkv, axis=1, num_outputs=3, _outputs=3)
    query, key = (g.op.RotaryEmbedding(x, inputs["cos"], inputs["sin"]) for x in (query, key))
    if window:
        query, key, value = (_to_windows(g, x, heads, window, head_dim) for x in (query, key, value))
    mask = inputs.get("mask in windows" if window else "mask")
    y = node(g.op.Attention(query, key, value, *([] if mask is None else [mask]), scale=head_dim**-0.5))
    return node(g.op.Reshape(permute(g, y, (0, 2, 1, 3)), [-1, heads * head_dim]))


def _to_windows(g: GraphBuilder, x: ir.Value, heads: int, window: int, head_dim: int) -> ir.Value:
    """(pictures, heads, patches, head_dim) -> (windows, heads, patches of one, head_dim)."""
    rows = node(g.op.Reshape(permute(g, x, (0, 2, 1, 3)), [-1, window, heads, head_dim]))
    return permute(g, rows, (0, 2, 1, 3))
