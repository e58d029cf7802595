"""Qwen2-VL's vision tower as a graph, in the ops of a dialect: a batch of pictures of one grid -> their visual tokens.

Patches come in merge-block order, so the merger is a reshape. Rotary rows are inputs. Pictures of other grids are other
batches: attention stays inside a picture without a mask. All inputs and outputs are float32, whatever the graph
computes in.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.dialects import Ops
from export.graph import FLOAT, Inputs, cast, node, part_of, set_output, sizes
from export.products import product
from export.weights import DENSE, Linear, Scheme, WeightWriter
from quantize.model_config import ModelConfig

EPSILON = 1e-6  # of every layer norm; Qwen2-VL's code has it fixed


def write_vision(g: GraphBuilder, config: ModelConfig, weights: WeightWriter, ops: Ops, scheme: Scheme) -> None:
    """Write the whole vision tower into an empty graph."""
    shape = config.shape.vision
    patches = patches_input(g, config)
    inputs = ops.picture_inputs(g, patches, shape, weights.dtype)
    residual = embed_patches(g, patches, config, weights, ops)
    y = ops.layer_norm(g, residual, *norm_of(weights, "visual.blocks.0.norm1"), EPSILON)
    for i in range(shape.depth):
        following = f"visual.blocks.{i + 1}.norm1" if i + 1 < shape.depth else "visual.merger.ln_q"
        y, residual = write_block(g, i, (y, residual), inputs, following, config, weights, ops, scheme, "fc")
    merge_patches(g, y, patches, config, weights, ops, scheme)


def write_block(
    g: GraphBuilder,
    number: int,
    stream: tuple[ir.Value, ir.Value],
    inputs: Inputs,
    following: str,
    config: ModelConfig,
    weights: WeightWriter,
    ops: Ops,
    scheme: Scheme,
    mlp: str,
) -> tuple[ir.Value, ir.Value]:
    """A block with layer norms and a plain MLP, its layers called `mlp`1 and 2: (normed, residual) -> the same.

    What it gives is normed for what comes next, by the norm called `following`.
    """
    block, (y, residual) = f"visual.blocks.{number}", stream
    with part_of(g, block):
        qkv = ops.linear(g, y, linear(weights, f"{block}.attn.qkv", scheme))
        y = ops.picture_attention(g, qkv, inputs, config.shape.vision)
        y = ops.linear(g, y, linear(weights, f"{block}.attn.proj", scheme))
        y, residual = ops.add_layer_norm(g, y, residual, *norm_of(weights, f"{block}.norm2"), EPSILON)
        y = ops.linear(g, y, linear(weights, f"{block}.mlp.{mlp}1", scheme))
        y = ops.activation(g, y, config.vision_activation)
        y = ops.linear(g, y, linear(weights, f"{block}.mlp.{mlp}2", scheme))
        return ops.add_layer_norm(g, y, residual, *norm_of(weights, following), EPSILON)


def patches_input(g: GraphBuilder, config: ModelConfig) -> ir.Value:
    """The graph's first input."""
    return g.input("patches", FLOAT, ["pictures", "patches", config.patch_dim])


def embed_patches(g: GraphBuilder, patches: ir.Value, config: ModelConfig, weights: WeightWriter, ops: Ops) -> ir.Value:
    """Patches (pictures, patches, values) -> (rows, width)."""
    rows = cast(g, node(g.op.Reshape(patches, [-1, config.patch_dim])), weights.dtype)
    # This layer sees raw pixels, where rounding costs most, and is small.
    name, bias = "visual.patch_embed.proj", config.shape.model_type == "qwen3_vl"
    embedding = weights.linear(name, [name], DENSE, bias=bias)
    return ops.linear(g, rows, embedding)


def merge_patches(
    g: GraphBuilder,
    y: ir.Value,
    patches: ir.Value,
    config: ModelConfig,
    weights: WeightWriter,
    ops: Ops,
    scheme: Scheme,
) -> None:
    """Normed patches (rows, width) -> the graph's output, visual tokens of the language model."""
    y = node(g.op.Reshape(y, [-1, config.merged_dim]))  # a block of patches becomes one token
    y = ops.activation(g, product(g, y, linear(weights, "visual.merger.mlp.0", scheme), ops), "gelu")
    y = product(g, y, linear(weights, "visual.merger.mlp.2", scheme), ops)
    give_tokens(g, y, patches, config, weights.dtype)


def give_tokens(g: GraphBuilder, y: ir.Value, patches: ir.Value, config: ModelConfig, dtype: ir.DataType) -> None:
    """Tokens (rows, embedding width) of all pictures -> the graph's output."""
    width = config.shape.embedding_width
    tokens = node(g.op.Reshape(cast(g, y, FLOAT, source=dtype), sizes(g, patches, 0, 1, -1, width)))
    set_output(g, tokens, "tokens", FLOAT, ["pictures", "tokens", width])


def linear(weights: WeightWriter, name: str, scheme: Scheme) -> Linear:
    """One of the tower's layers; all have a bias."""
    return weights.linear(name, [name], scheme, bias=True)


def norm_of(weights: WeightWriter, name: str) -> tuple[ir.Value, ir.Value]:
    """Weight and bias of a layer norm."""
    return weights.vector(f"{name}.weight"), weights.vector(f"{name}.bias")
