"""Which tensors a checkpoint has, and their shapes: known before a long export starts, not in its middle.

Qwen2-VL's and Qwen2.5-VL's decoders are alike, Qwen3-VL's norms heads; a family's own vision tower is one function and
one case of a match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gemvg_edge.errors import GemvgError
from quantize.model_config import ModelConfig
from train.checkpoint import HEAD

EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_LAYER = EMBEDDING.removesuffix(".weight")
PLACES = "visual.pos_embed.weight"  # looked up in, like the embedding table

Tensor = tuple[str, tuple[int, ...]]  # name and shape


def expected_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor that the graphs are made of, by its name on the hub."""
    hidden, vocab = config.shape.hidden_size, config.shape.vocab_size
    yield EMBEDDING, (vocab, hidden)
    for i in range(config.shape.layers):
        for name, shape in _decoder_layer(config):
            yield f"model.layers.{i}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config.tied_head:
        yield HEAD, (vocab, hidden)
    yield from _vision_tower(config)


def _decoder_layer(config: ModelConfig) -> Iterator[Tensor]:
    shape, inner = config.shape, config.intermediate_size
    hidden, width, kv_width = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{norm}.weight", (hidden,)
    for part, outputs in (("q", width), ("k", kv_width), ("v", kv_width)):
        yield f"self_attn.{part}_proj.weight", (outputs, hidden)
        if not config.head_norms:
            yield f"self_attn.{part}_proj.bias", (outputs,)
    if config.head_norms:
        for part in "qk":
            yield from _rms_norm(f"self_attn.{part}_norm", shape.head_dim)
    yield "self_attn.o_proj.weight", (hidden, width)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)


def _vision_tower(config: ModelConfig) -> Iterator[Tensor]:
    numbers = config.settings.preprocessing
    width, inner = config.shape.vision.embed_dim, config.vision_intermediate_size
    patch = (config.channels, numbers.temporal_patch_size, numbers.patch_size, numbers.patch_size)
    yield "visual.patch_embed.proj.weight", (width, *patch)
    block: Callable[[str, int, int], Iterator[Tensor]]
    match config.shape.model_type:
        case "qwen2_vl":
            block, norm = _qwen2_block, _norm
        case "qwen2_5_vl":
            block, norm = _qwen2_5_block, _rms_norm
        case "qwen3_vl":
            yield from _qwen3_tower(config)
            return
        case other:
            raise GemvgError(f"the tensors of a {other} are not known")
    for i in range(config.shape.vision.depth):
        yield from block(f"visual.blocks.{i}", width, inner)
    yield from norm("visual.merger.ln_q", width)
    yield from _linear("visual.merger.mlp.0", config.merged_dim, config.merged_dim)
    yield from _linear("visual.merger.mlp.2", config.shape.hidden_size, config.merged_dim)


def _qwen3_tower(config: ModelConfig) -> Iterator[Tensor]:
    """What comes after the weight of the patch embedding."""
    shape, width, merged = config.shape.vision, config.shape.vision.embed_dim, config.merged_dim
    yield "visual.patch_embed.proj.bias", (width,)
    yield PLACES, (shape.place_side**2, width)
    for i in range(shape.depth):
        yield from _qwen2_block(f"visual.blocks.{i}", width, config.vision_intermediate_size, "linear_fc")
    mergers = [("visual.merger", width)]  # each with the width that its norm sees
    mergers += [(f"visual.deepstack_merger_list.{k}", merged) for k in range(config.shape.deepstack)]
    for merger, normed in mergers:
        yield from _norm(f"{merger}.norm", normed)
        yield from _linear(f"{merger}.linear_fc1", merged, merged)
        yield from _linear(f"{merger}.linear_fc2", config.shape.hidden_size, merged)


def _qwen2_block(block: str, width: int, inner: int, mlp: str = "fc") -> Iterator[Tensor]:
    yield from _norm(f"{block}.norm1", width)
    yield from _norm(f"{block}.norm2", width)
    yield from _linear(f"{block}.attn.qkv", 3 * width, width)
    yield from _linear(f"{block}.attn.proj", width, width)
    yield from _linear(f"{block}.mlp.{mlp}1", inner, width)
    yield from _linear(f"{block}.mlp.{mlp}2", width, inner)


def _qwen2_5_block(block: str, width: int, inner: int) -> Iterator[Tensor]:
    yield from _rms_norm(f"{block}.norm1", width)
    yield from _rms_norm(f"{block}.norm2", width)
    yield from _linear(f"{block}.attn.qkv", 3 * width, width)
    yield from _linear(f"{block}.attn.proj", width, width)
    yield from _linear(f"{block}.mlp.gate_proj", inner, width)
    yield from _linear(f"{block}.mlp.up_proj", inner, width)
    yield from _linear(f"{block}.mlp.down_proj", width, inner)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[Tensor]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[Tensor]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _rms_norm(name: str, width: int) -> Iterator[Tensor]:
    yield f"{name}.weight", (width,)
