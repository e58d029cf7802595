"""Qwen2.5-VL's vision tower as a graph, in the ops of a dialect: RMS norms, gated MLPs, most attention in windows.

Patches come window by window (gemvg_edge/engines/vision_inputs.py), each window in as many slots as a whole one has;
`valid` says which slots hold a patch. Tokens leave in that order, and the runtime picks those that are any. Everything
else is as in vision.py.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from export.dialects import Ops
from export.graph import part_of
from export.vision import embed_patches, linear, merge_patches, patches_input
from export.weights import Scheme, WeightWriter
from quantize.model_config import ModelConfig

EPSILON = 1e-6  # of every norm; Qwen2.5-VL's code has it fixed


def write_vision_qwen2_5(g: GraphBuilder, config: ModelConfig, weights: WeightWriter, ops: Ops, scheme: Scheme) -> None:
    """Write the whole vision tower into an empty graph."""
    shape = config.shape.vision
    window = (shape.window * config.settings.preprocessing.merge_size) ** 2  # patches
    patches = patches_input(g, config)
    inputs = ops.picture_inputs(g, patches, shape, weights.dtype, window)
    residual = embed_patches(g, patches, config, weights, ops)
    y = ops.rms_norm(g, residual, weights.vector("visual.blocks.0.norm1.weight"), EPSILON)
    for i in range(shape.depth):
        block = f"visual.blocks.{i}"
        with part_of(g, block):
            qkv = ops.linear(g, y, linear(weights, f"{block}.attn.qkv", scheme))
            y = ops.picture_attention(g, qkv, inputs, shape, 0 if i in config.full_attention_blocks else window)
            y = ops.linear(g, y, linear(weights, f"{block}.attn.proj", scheme))
            y, residual = ops.add_rms_norm(g, y, residual, weights.vector(f"{block}.norm2.weight"), EPSILON)
            y = _mlp(g, y, f"{block}.mlp", weights, ops, scheme)
            following = f"visual.blocks.{i + 1}.norm1" if i + 1 < shape.depth else "visual.merger.ln_q"
            y, residual = ops.add_rms_norm(g, y, residual, weights.vector(f"{following}.weight"), EPSILON)
    merge_patches(g, y, patches, config, weights, ops, scheme)


def _mlp(g: GraphBuilder, x: ir.Value, name: str, weights: WeightWriter, ops: Ops, scheme: Scheme) -> ir.Value:
    gate = ops.linear(g, x, linear(weights, f"{name}.gate_proj", scheme))
    up = ops.linear(g, x, linear(weights, f"{name}.up_proj", scheme))
    return ops.linear(g, ops.silu_times(g, gate, up), linear(weights, f"{name}.down_proj", scheme))
