"""Qwen3-VL's vision tower as a graph, in the ops of a dialect: learned places beside the rotary ones, and deepstack.

The learned table is of one size and is stretched over each picture: `place_index` and `place_weight` say which four of
its rows a patch's place lies between. What some blocks give is merged as the last one's output is, and leaves beside
it: a token is `hidden` numbers of the last block and as many of each of these. Everything else is as in vision.py.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.dialects import Ops
from export.graph import FLOAT, INT64, cast, node, sizes
from export.products import product
from export.vision import EPSILON, embed_patches, give_tokens, linear, norm_of, patches_input, write_block
from export.weights import Scheme, WeightWriter
from quantize.model_config import ModelConfig
from quantize.tensors import PLACES


def write_vision_qwen3(g: GraphBuilder, config: ModelConfig, weights: WeightWriter, ops: Ops, scheme: Scheme) -> None:
    """Write the whole vision tower into an empty graph."""
    shape = config.shape.vision
    patches = patches_input(g, config)
    inputs = ops.picture_inputs(g, patches, shape, weights.dtype)
    residual = _add_places(g, embed_patches(g, patches, config, weights, ops), patches, config, weights)
    y = ops.layer_norm(g, residual, *norm_of(weights, "visual.blocks.0.norm1"), EPSILON)
    features: list[ir.Value] = []
    for i in range(shape.depth):
        following = f"visual.blocks.{i + 1}.norm1" if i + 1 < shape.depth else "visual.merger.norm"
        y, residual = write_block(g, i, (y, residual), inputs, following, config, weights, ops, scheme, "linear_fc")
        if i in config.deepstack_blocks:
            merger = f"visual.deepstack_merger_list.{len(features)}"
            together = node(g.op.Reshape(residual, [-1, config.merged_dim]))
            normed = ops.layer_norm(g, together, *norm_of(weights, f"{merger}.norm"), EPSILON)
            features.append(_merge(g, normed, merger, weights, ops, scheme))
    y = _merge(g, node(g.op.Reshape(y, [-1, config.merged_dim])), "visual.merger", weights, ops, scheme)
    tokens = node(g.op.Concat(y, *features, axis=-1)) if features else y
    give_tokens(g, tokens, patches, config, weights.dtype)


def _add_places(
    g: GraphBuilder, rows: ir.Value, patches: ir.Value, config: ModelConfig, weights: WeightWriter
) -> ir.Value:
    """Embedded patches (rows, width) with each one's place among the learned ones added."""
    width = config.shape.vision.embed_dim
    index = g.input("place_index", INT64, ["patches", 4])
    weight = cast(g, g.input("place_weight", FLOAT, ["patches", 4]), weights.dtype)
    nearest = g.op.Gather(weights.matrix(PLACES), index, axis=0)  # (patches, 4, width)
    places = g.op.Reshape(g.op.MatMul(g.op.Unsqueeze(weight, [1]), nearest), [-1, width])
    pictures = g.op.Reshape(rows, sizes(g, patches, 0, 2, width))
    return node(g.op.Reshape(g.op.Add(pictures, places), [-1, width]))


def _merge(g: GraphBuilder, x: ir.Value, merger: str, weights: WeightWriter, ops: Ops, scheme: Scheme) -> ir.Value:
    """Normed blocks of patches (tokens, merged width) -> (tokens, hidden)."""
    y = ops.activation(g, product(g, x, linear(weights, f"{merger}.linear_fc1", scheme), ops), "gelu")
    return product(g, y, linear(weights, f"{merger}.linear_fc2", scheme), ops)
