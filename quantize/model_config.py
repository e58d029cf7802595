"""The model's shape: config.json and generation_config.json of a checkpoint, on top of what train.checkpoint reads.

Accepts the flat configs of Qwen2-VL and Qwen2.5-VL checkpoints on the hub, and nested ones: Qwen3-VL's and those that
transformers 5 saves. Refuses what the graphs do not compute (another rotary type, a sliding window, another activation)
instead of ignoring it. A further family of models is one more case of `_read_vision`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gemvg_edge.bundle import MODEL_TYPES, MOST_DEEPSTACK, MOST_SIDE, THETAS, ModelShape, VisionShape
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file
from gemvg_edge.images import Preprocessing
from gemvg_edge.json_object import JsonObject
from train.checkpoint import CONFIG, CheckpointSettings, read_object, read_preprocessor, read_settings, text_section

GENERATION = "generation_config.json"
CHANNELS = 3  # of a picture: the runtime makes patches of no others
# What a family's vision tower may use, its usual one first; Qwen2.5-VL's is that of a gated MLP.
VISION_ACTIVATIONS = {
    "qwen2_vl": ("quick_gelu", "gelu"),
    "qwen2_5_vl": ("silu",),
    "qwen3_vl": ("gelu_pytorch_tanh",),
}


@dataclass(frozen=True)
class ModelConfig:
    """The model's shape, what only its graphs need, and the settings that go into the manifest.

    `shape.model_type` says which network it is: Qwen2-VL's vision tower has layer norms and a plain MLP, Qwen2.5-VL's
    has RMS norms, a gated MLP and attention in windows. Qwen3-VL's has learned places beside the rotary ones and gives
    features of several blocks; its decoder norms each head's queries and keys instead of adding biases to them.
    """

    shape: ModelShape
    settings: CheckpointSettings
    rms_norm_eps: float
    tied_head: bool
    intermediate_size: int
    vision_intermediate_size: int
    vision_activation: str
    channels: int
    full_attention_blocks: tuple[int, ...]  # of a vision tower with windows: the blocks that see the whole picture
    deepstack_blocks: tuple[int, ...]  # the vision blocks whose outputs go to the decoder's first layers, ascending

    @property
    def head_norms(self) -> bool:
        """Whether the decoder norms each head's queries and keys, which then have no bias: Qwen3's does."""
        return self.shape.model_type == "qwen3_vl"

    @property
    def patch_dim(self) -> int:
        """How many numbers a patch has: channels x time x patch x patch."""
        numbers = self.settings.preprocessing
        return self.channels * numbers.temporal_patch_size * numbers.patch_size**2

    @property
    def merged_dim(self) -> int:
        """The width of the patches that become one token, side by side."""
        return self.shape.vision.embed_dim * self.settings.preprocessing.merge_size**2


def read_config(folder: Path, profile: str | None = None) -> ModelConfig:
    """Everything that export needs from the JSON files of a checkpoint folder; `profile` as in read_settings."""
    config = read_object(folder / CONFIG)
    if (model_type := config.content.get("model_type")) not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise GemvgError(f"{config.path}: unknown model type {model_type!r}; this gemvg-edge exports {known}")
    text = text_section(config)
    vision = config.object("vision_config")
    settings = read_settings(folder, profile)
    _check_supported(model_type, text, vision, settings.preprocessing, read_preprocessor(folder).path.name)
    tower = _read_vision(model_type, vision, settings.preprocessing)
    shape = _read_shape(config, text, tower, _read_eos(folder, config, text))
    if (tokens := settings.tokenizer.get_vocab_size()) > shape.vocab_size:
        raise GemvgError(
            f"{folder}: the tokenizer has {tokens} tokens, the model {shape.vocab_size}; take both from one checkpoint"
        )
    return ModelConfig(
        shape=shape,
        settings=settings,
        rms_norm_eps=text.value("rms_norm_eps", float, low=0, high=1),
        tied_head=any(part.value("tie_word_embeddings", bool, False) for part in (config, text)),
        intermediate_size=_count(text, "intermediate_size"),
        vision_intermediate_size=tower.intermediate_size,
        vision_activation=_vision_activation(model_type, vision),
        channels=vision.value("in_channels", int, vision.value("in_chans", int, 3), low=CHANNELS, high=CHANNELS),
        full_attention_blocks=tower.full_attention_blocks,
        deepstack_blocks=tower.deepstack_blocks,
    )


class _Tower(NamedTuple):
    """What families say each in their own way of their vision towers."""

    shape: VisionShape
    intermediate_size: int
    full_attention_blocks: tuple[int, ...] = ()
    deepstack_blocks: tuple[int, ...] = ()


def _read_vision(model_type: str, vision: JsonObject, preprocessing: Preprocessing) -> _Tower:
    match model_type:
        case "qwen2_vl":
            shape = _vision_shape(vision, _count(vision, "embed_dim"), 0)
            return _Tower(shape, int(shape.embed_dim * vision.value("mlp_ratio", float, 4.0, low=0.01, high=1000)))
        case "qwen2_5_vl":
            cell = preprocessing.patch_size * preprocessing.merge_size
            if (window := _count(vision, "window_size") // cell) < 1:
                raise GemvgError(
                    f"{vision.path}: vision window_size is below the {cell} pixels of a token; {vision.fix}"
                )
            shape = _vision_shape(vision, _count(vision, "hidden_size"), window)
            whole = vision.integers("fullatt_block_indexes", low=0, high=shape.depth - 1)
            return _Tower(shape, _count(vision, "intermediate_size"), whole)
        case "qwen3_vl":
            shape = _vision_shape(vision, _count(vision, "hidden_size"), 0, _place_side(vision))
            blocks = vision.integers("deepstack_visual_indexes", low=0, high=shape.depth - 1)
            if list(blocks) != sorted(set(blocks)) or len(blocks) > MOST_DEEPSTACK:
                raise GemvgError(
                    f"{vision.path}: vision deepstack_visual_indexes are {list(blocks)}, not up to {MOST_DEEPSTACK} "
                    f"blocks in ascending order; {vision.fix}"
                )
            return _Tower(shape, _count(vision, "intermediate_size"), (), blocks)
    raise GemvgError(f"{vision.path}: the vision tower of a {model_type} is not known")


def _place_side(vision: JsonObject) -> int:
    count = vision.value("num_position_embeddings", int, low=1, high=MOST_SIDE**2)
    if (side := math.isqrt(count)) ** 2 != count:
        raise GemvgError(f"{vision.path}: vision num_position_embeddings is {count}, no square; {vision.fix}")
    return side


def _vision_shape(vision: JsonObject, width: int, window: int, place_side: int = 0) -> VisionShape:
    heads = _count(vision, "num_heads")
    if width % heads or width // heads % 4:
        raise GemvgError(f"{vision.path}: vision width {width} is not num_heads {heads} times a multiple of 4")
    if vision.content.get("rope_scaling") is not None or vision.content.get("rope_theta") is not None:
        raise GemvgError(
            f"{vision.path}: {vision.place}rope_theta and rope_scaling are not read; Qwen2-VL's vision tower has "
            "rope_parameters, or the usual base"
        )
    return VisionShape(
        depth=_count(vision, "depth"),
        embed_dim=width,
        heads=heads,
        head_dim=width // heads,
        rope_theta=vision.object("rope_parameters", {}).value(
            "rope_theta", float, 10000.0, low=THETAS[0], high=THETAS[1]
        ),
        window=window,
        place_side=place_side,
    )


def _vision_activation(model_type: str, vision: JsonObject) -> str:
    return vision.value("hidden_act", str, VISION_ACTIVATIONS[model_type][0])


def _read_shape(config: JsonObject, text: JsonObject, tower: _Tower, eos: tuple[int, ...]) -> ModelShape:
    model_type, layers = config.value("model_type", str), _count(text, "num_hidden_layers")
    qwen3 = model_type == "qwen3_vl"
    if len(tower.deepstack_blocks) > layers:
        raise GemvgError(
            f"{text.path}: deepstack_visual_indexes has {len(tower.deepstack_blocks)} blocks, more than the decoder's "
            f"{layers} layers that would take them; {text.fix}"
        )
    hidden, heads = _count(text, "hidden_size"), _count(text, "num_attention_heads")
    kv_heads = text.value("num_key_value_heads", int, heads, low=1)
    if (hidden % heads and not qwen3) or heads % kv_heads:
        raise GemvgError(
            f"{text.path}: hidden_size {hidden}, num_attention_heads {heads} and num_key_value_heads {kv_heads} do not "
            f"divide each other; {text.fix}"
        )
    head_dim = text.value("head_dim", int, low=1) if qwen3 else hidden // heads
    if (stated := text.value("head_dim", int, head_dim)) != head_dim:
        raise GemvgError(f"{text.path}: head_dim {stated} is not hidden_size / num_attention_heads, {head_dim}")
    if head_dim % 16:
        raise GemvgError(f"{text.path}: heads of {head_dim} numbers; the fused attention takes multiples of 16")
    theta, sections = _read_rope(text, head_dim, qwen3)
    vocabulary = _count(text, "vocab_size")
    return ModelShape(
        model_type=model_type,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        mrope_section=sections,
        vocab_size=vocabulary,
        image_token_id=config.value("image_token_id", int, low=0, high=vocabulary - 1),
        eos_token_ids=eos,
        vision=tower.shape,
        mrope_interleaved=qwen3,
        deepstack=len(tower.deepstack_blocks),
    )


def _read_rope(text: JsonObject, head_dim: int, interleaved: bool) -> tuple[float, tuple[int, int, int]]:
    rope = text.object("rope_scaling" if text.content.get("rope_scaling") else "rope_parameters", {})
    kind = rope.value("rope_type", str, rope.value("type", str, "default"))
    if kind not in ("default", "mrope"):
        raise GemvgError(f"{rope.path}: rotary type {kind!r} is not supported; Qwen2-VL's is 'mrope' (or 'default')")
    stated_so = rope.value("mrope_interleaved", bool, interleaved)
    if rope.value("partial_rotary_factor", float, 1.0) != 1 or (stated_so and not interleaved):
        raise GemvgError(
            f"{rope.path}: partial or interleaved rotary positions are not supported; Qwen2-VL has neither, and "
            "Qwen3-VL's are interleaved but whole"
        )
    if interleaved and not stated_so:  # transformers would not look at it
        raise GemvgError(f"{rope.path}: mrope_interleaved is false, unlike in every Qwen3-VL; {rope.fix}")
    sections, half = rope.integers("mrope_section", low=0), head_dim // 2
    if len(sections) != 3 or sum(sections) != half:
        raise GemvgError(f"{rope.path}: mrope_section is {list(sections)}; it needs three numbers with the sum {half}")
    # Somebody's default would be as good as any other number: boxes would be wrong without a word.
    stated = rope if rope.content.get("rope_theta") is not None else text
    theta = stated.value("rope_theta", float, low=THETAS[0], high=THETAS[1])
    return theta, (sections[0], sections[1], sections[2])


def _read_eos(folder: Path, config: JsonObject, text: JsonObject) -> tuple[int, ...]:
    last = _count(text, "vocab_size") - 1
    generation = [read_object(folder / GENERATION)] if is_file(folder / GENERATION) else []
    for source in (*generation, config, text):
        found = source.content.get("eos_token_id")
        if found is not None:
            ids = source.integers("eos_token_id", low=0, high=last) if isinstance(found, list) else ()
            if not ids and found == []:
                raise GemvgError(f"{source.path}: eos_token_id is an empty list; an answer could not end")
            return ids or (source.value("eos_token_id", int, low=0, high=last),)
    raise GemvgError(f"{config.path}: no eos_token_id here nor in {GENERATION}; an answer could not end")


def _check_supported(
    model_type: str, text: JsonObject, vision: JsonObject, preprocessing: Preprocessing, stated_in: str
) -> None:
    if text.value("use_sliding_window", bool, False) or "sliding_attention" in text.value("layer_types", list, []):
        raise GemvgError(f"{text.path}: use_sliding_window is true; sliding-window attention is not supported")
    if model_type == "qwen3_vl" and text.value("attention_bias", bool, False):
        raise GemvgError(f"{text.path}: attention_bias is true; Qwen3-VL's attention has no biases")
    if (name := text.value("hidden_act", str, "silu")) != "silu":
        raise GemvgError(f"{text.path}: hidden_act {name!r} is not supported; Qwen2-VL's decoder uses 'silu'")
    if (name := _vision_activation(model_type, vision)) not in (known := VISION_ACTIVATIONS[model_type]):
        raise GemvgError(f"{vision.path}: vision hidden_act {name!r} is not {' or '.join(map(repr, known))}")
    for in_vision, ours in (
        ("patch_size", preprocessing.patch_size),
        ("temporal_patch_size", preprocessing.temporal_patch_size),
        ("spatial_merge_size", preprocessing.merge_size),
    ):
        if (theirs := vision.content.get(in_vision, ours)) != ours:
            raise GemvgError(f"{vision.path}: vision {in_vision} is {theirs}, but {stated_in} says {ours}")


def _count(section: JsonObject, key: str) -> int:
    count = section.value(key, int)
    if count < 1:
        raise GemvgError(f"{section.path}: {section.place}{key} is {count}, less than 1; {section.fix}")
    return count
