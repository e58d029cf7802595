"""config.json, generation_config.json and preprocessor_config.json of a checkpoint -> the numbers that export needs.

Accepts the flat config of the Qwen2-VL checkpoints on the hub and the nested one that transformers 5 saves. Refuses
what the graphs do not compute (another rotary type, a sliding window, another activation) instead of ignoring it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.bundle import MODEL_TYPES, ModelShape, VisionShape
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Preprocessing
from gemvg_edge.prompt import PromptTemplate

CONFIG, GENERATION, PREPROCESSOR = "config.json", "generation_config.json", "preprocessor_config.json"
VISION_ACTIVATIONS = ("quick_gelu", "gelu")


@dataclass(frozen=True)
class ModelConfig:
    """The model's shape, what only its graphs need, and the settings that go into the manifest."""

    shape: ModelShape
    rms_norm_eps: float
    tied_head: bool
    patch_dim: int  # channels x time x patch x patch
    merge_size: int
    vision_activation: str
    preprocessing: Preprocessing
    answer: AnswerFormat
    prompt: PromptTemplate


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a checkpoint folder."""
    if not path.is_file():
        raise GemvgError(f"{path}: no such file; a checkpoint folder has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GemvgError(f"{path} is not JSON ({error}); download the checkpoint again") from None
    if not isinstance(content, dict):
        raise GemvgError(f"{path} is not a JSON object; download the checkpoint again")
    return content


def read_config(folder: Path) -> ModelConfig:
    """Everything that export needs from the JSON files of a checkpoint folder."""
    path = folder / CONFIG
    config = read_json(path)
    if config.get("model_type") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise GemvgError(f"{path}: unknown model type {config.get('model_type')!r}; this gemvg-edge exports {known}")
    text = config.get("text_config") or config
    vision = _need(path, config, "vision_config")
    preprocessing = Preprocessing.from_config(read_json(folder / PREPROCESSOR))
    _check_supported(path, text, vision, preprocessing)
    grounding = config.get("grounding") or {}
    try:
        answer = AnswerFormat.from_config(grounding.get("answer") or {})
        prompt = PromptTemplate.from_config(grounding.get("prompt") or {})
    except TypeError as error:
        raise GemvgError(f"{path}: `grounding` has a field that this gemvg-edge does not know ({error})") from None
    channels = vision.get("in_channels") or vision.get("in_chans") or 3
    return ModelConfig(
        shape=_read_shape(path, config, text, vision, _read_eos(folder, config, text)),
        rms_norm_eps=float(_need(path, text, "rms_norm_eps")),
        tied_head=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        patch_dim=channels * preprocessing.temporal_patch_size * preprocessing.patch_size**2,
        merge_size=preprocessing.merge_size,
        vision_activation=vision.get("hidden_act", "quick_gelu"),
        preprocessing=preprocessing,
        answer=answer,
        prompt=prompt,
    )


def _read_shape(
    path: Path, config: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any], eos: tuple[int, ...]
) -> ModelShape:
    hidden, heads = _need(path, text, "hidden_size"), _need(path, text, "num_attention_heads")
    head_dim = hidden // heads
    if head_dim % 16:
        raise GemvgError(f"{path}: heads of {head_dim} numbers; the fused attention takes multiples of 16")
    theta, sections = _read_rope(path, text, head_dim)
    embed_dim, vision_heads = _need(path, vision, "embed_dim"), _need(path, vision, "num_heads")
    vision_rope = vision.get("rope_parameters") or {}
    return ModelShape(
        model_type=config["model_type"],
        hidden_size=hidden,
        layers=_need(path, text, "num_hidden_layers"),
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=theta,
        mrope_section=sections,
        vocab_size=_need(path, text, "vocab_size"),
        image_token_id=_need(path, config, "image_token_id"),
        eos_token_ids=eos,
        vision=VisionShape(
            depth=_need(path, vision, "depth"),
            embed_dim=embed_dim,
            heads=vision_heads,
            head_dim=embed_dim // vision_heads,
            rope_theta=float(vision_rope.get("rope_theta", 10000.0)),
        ),
    )


def _read_rope(path: Path, text: Mapping[str, Any], head_dim: int) -> tuple[float, tuple[int, int, int]]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise GemvgError(f"{path}: rotary type {kind!r} is not supported; Qwen2-VL's is 'mrope' (or 'default')")
    sections = rope.get("mrope_section")
    if not isinstance(sections, list) or len(sections) != 3 or sum(sections) * 2 != head_dim:
        raise GemvgError(f"{path}: mrope_section is {sections!r}; it needs three numbers with the sum {head_dim // 2}")
    theta = rope.get("rope_theta") or text.get("rope_theta") or 1000000.0
    return float(theta), (sections[0], sections[1], sections[2])


def _read_eos(folder: Path, config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[int, ...]:
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    for source in (generation, config, text):
        found = source.get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    raise GemvgError(f"{folder / CONFIG}: no eos_token_id here nor in {GENERATION}; an answer could not end")


def _check_supported(
    path: Path, text: Mapping[str, Any], vision: Mapping[str, Any], preprocessing: Preprocessing
) -> None:
    if text.get("use_sliding_window"):
        raise GemvgError(f"{path}: use_sliding_window is true; sliding-window attention is not supported")
    if text.get("hidden_act", "silu") != "silu":
        raise GemvgError(f"{path}: hidden_act {text['hidden_act']!r} is not supported; Qwen2-VL's decoder uses 'silu'")
    if vision.get("hidden_act", "quick_gelu") not in VISION_ACTIVATIONS:
        raise GemvgError(f"{path}: vision hidden_act {vision['hidden_act']!r} is neither 'quick_gelu' nor 'gelu'")
    for in_vision, ours in (
        ("patch_size", preprocessing.patch_size),
        ("temporal_patch_size", preprocessing.temporal_patch_size),
        ("spatial_merge_size", preprocessing.merge_size),
    ):
        if vision.get(in_vision, ours) != ours:
            raise GemvgError(f"{path}: vision {in_vision} is {vision[in_vision]}, but {PREPROCESSOR} says {ours}")


def _need(path: Path, section: Mapping[str, Any], key: str) -> Any:
    value = section.get(key)
    if value is None:
        raise GemvgError(f"{path} lacks {key}; is this a Qwen2-VL checkpoint?")
    return value
