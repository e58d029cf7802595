"""The vision tower as a graph, in the ops of a dialect: a batch of pictures of one patch grid -> their visual tokens.

Patches come in merge-block order, so the merger is a reshape. Rotary rows are inputs. Pictures of other grids are other
batches: attention stays inside a picture without a mask.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.dialects import Ops
from export.weights import FLOAT32, Linear, Scheme, WeightWriter
from quantize.model_config import ModelConfig

FLOAT = ir.DataType.FLOAT
EPSILON = 1e-6  # of every layer norm; Qwen2-VL's code has it fixed


def write_vision(g: GraphBuilder, config: ModelConfig, weights: WeightWriter, ops: Ops, scheme: Scheme) -> None:
    """Write the whole vision tower into an empty graph."""
    shape = config.shape.vision
    patches = g.input("patches", FLOAT, ["pictures", "patches", config.patch_dim])
    cos = g.input("cos", FLOAT, ["patches", shape.head_dim // 2])
    sin = g.input("sin", FLOAT, ["patches", shape.head_dim // 2])

    # The first layer sees raw pixels, where rounding costs most, and is small.
    embedding = weights.linear("visual.patch_embed.proj", ["visual.patch_embed.proj"], FLOAT32, bias=False)
    residual = ops.linear(g, patches, embedding)
    y = ops.layer_norm(g, residual, *_norm(weights, "visual.blocks.0.norm1"), EPSILON)
    for i in range(shape.depth):
        block = f"visual.blocks.{i}"
        qkv = ops.linear(g, y, _linear(weights, f"{block}.attn.qkv", scheme))
        y = ops.picture_attention(g, qkv, cos, sin, shape.heads)
        y = ops.linear(g, y, _linear(weights, f"{block}.attn.proj", scheme))
        y, residual = ops.add_layer_norm(g, y, residual, *_norm(weights, f"{block}.norm2"), EPSILON)
        y = ops.activation(g, ops.linear(g, y, _linear(weights, f"{block}.mlp.fc1", scheme)), config.vision_activation)
        y = ops.linear(g, y, _linear(weights, f"{block}.mlp.fc2", scheme))
        following = f"visual.blocks.{i + 1}.norm1" if i + 1 < shape.depth else "visual.merger.ln_q"
        y, residual = ops.add_layer_norm(g, y, residual, *_norm(weights, following), EPSILON)

    y = g.op.Reshape(y, [0, -1, config.merged_dim])  # a block of patches becomes one token
    y = ops.activation(g, ops.linear(g, y, _linear(weights, "visual.merger.mlp.0", scheme)), "gelu")
    tokens = ops.linear(g, y, _linear(weights, "visual.merger.mlp.2", scheme))
    tokens.type, tokens.shape = ir.TensorType(FLOAT), ir.Shape(["pictures", "tokens", config.shape.hidden_size])
    g.add_output(tokens, "tokens")


def _linear(weights: WeightWriter, name: str, scheme: Scheme) -> Linear:
    return weights.linear(name, [name], scheme, bias=True)


def _norm(weights: WeightWriter, name: str) -> tuple[ir.Value, ir.Value]:
    return weights.vector(f"{name}.weight"), weights.vector(f"{name}.bias")
