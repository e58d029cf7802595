"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints, as transformers saves them, for tests of later stages.

Weights keep activations near 1; norms and biases are random too, so that a forgotten or misplaced one shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from export.reference import visual_tokens as visual_tokens_of
from gemvg_edge.images import Grid, Preprocessing, patchify
from gemvg_edge.positions import mrope_positions, visual_tokens
from gemvg_edge.prompt import END_OF_TURN, IMAGE_TOKEN, token_id
from quantize.torch_model import family
from tests.tokenizers_small import small_tokenizer
from train.checkpoint import SINGLE

TOKENIZER = small_tokenizer()
TEXT_TOKENS = token_id(TOKENIZER, "<|endoftext|>")  # all below are plain text
IMAGE_TOKEN_ID = token_id(TOKENIZER, IMAGE_TOKEN)
EOS_TOKEN_ID = token_id(TOKENIZER, END_OF_TURN)
# Qwen2-VL-Instruct's own chat_template.json.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What Qwen3-VL-Instruct's writes for such messages: no system turn unless one is given.
CHAT_TEMPLATE_3 = CHAT_TEMPLATE.replace(
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}",
    "",
)
PREPROCESSING = Preprocessing(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
PREPROCESSING_3 = Preprocessing(
    patch_size=16, min_pixels=32 * 32, max_pixels=32 * 32 * 64, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
)

TINY: dict[str, Any] = {
    "text_config": {
        "vocab_size": 448, "hidden_size": 96, "intermediate_size": 104, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 6, 6]},
    },
    "vision_config": {
        "depth": 2, "embed_dim": 48, "hidden_size": 96, "num_heads": 3, "patch_size": 14, "mlp_ratio": 2,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    },
}  # fmt: skip
TRUE_7B_WIDTHS: dict[str, Any] = {
    "text_config": {
        "vocab_size": 448, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 2,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 2, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "patch_size": 14},
}  # fmt: skip
# The same with one layer and one block: what is done at these widths is done to each alike.
ONE_7B_LAYER: dict[str, Any] = {
    "text_config": TRUE_7B_WIDTHS["text_config"] | {"num_hidden_layers": 1},
    "vision_config": TRUE_7B_WIDTHS["vision_config"] | {"depth": 1},
}
# Windows of 2 x 2 tokens, so that small pictures have several; the block in the middle sees the whole picture.
TINY_2_5: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "text_config": TINY["text_config"],
    "vision_config": {
        "depth": 3, "hidden_size": 48, "intermediate_size": 56, "out_hidden_size": 96, "num_heads": 3,
        "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1],
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    },
}  # fmt: skip
# Heads that together are wider than a token, a table of places that no picture has the size of, two deepstack features.
TINY_3: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "grounding": {"prompt": {"system_turn": False}},
    "text_config": {
        "vocab_size": 448, "hidden_size": 96, "intermediate_size": 104, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 20.0, "mrope_section": [8, 4, 4], "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 4, "hidden_size": 48, "intermediate_size": 56, "out_hidden_size": 96, "num_heads": 2,
        "patch_size": 16, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2],
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    },
}  # fmt: skip
# The same with widths that groups of 32 divide.
GROUPED, GROUPED_2_5, GROUPED_3 = (
    sizes | {"text_config": sizes["text_config"] | {"intermediate_size": 128}} for sizes in (TINY, TINY_2_5, TINY_3)
)
# The vision tower's; the decoder's own are Qwen2-VL's, so of that there is only what makes a checkpoint whole.
TRUE_2_5_WIDTHS: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "text_config": TRUE_7B_WIDTHS["text_config"] | {"intermediate_size": 128, "num_hidden_layers": 1},
    "vision_config": {
        "depth": 2, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
    },
}  # fmt: skip


# The widths of Qwen3-VL-2B with those of its decoder's layers that take deepstack features; and of the 8B.
TRUE_3_2B_WIDTHS: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "text_config": {
        "vocab_size": 448, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 3,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 3, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048, "num_heads": 16,
        "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1, 2],
    },
}  # fmt: skip
TRUE_3_8B_WIDTHS: dict[str, Any] = TRUE_3_2B_WIDTHS | {
    "text_config": TRUE_3_2B_WIDTHS["text_config"] | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 1, "num_attention_heads": 32,
    },
    "vision_config": TRUE_3_2B_WIDTHS["vision_config"] | {
        "depth": 2, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096,
        "deepstack_visual_indexes": [0],
    },
}  # fmt: skip


def write_checkpoint(
    folder: Path, sizes: dict[str, Any] = TINY, *, tied: bool = False, bfloat16: bool = False, **saving: Any
) -> PreTrainedModel:
    """Save a random checkpoint with tokenizer and preprocessor, and give back its model in float32, eager attention.

    `sizes` may name a `model_type`, without which it is a Qwen2-VL, and what the checkpoint says of itself.
    """
    model_type = sizes.get("model_type", "qwen2_vl")
    kind = family(model_type)
    text = sizes["text_config"] | {"eos_token_id": EOS_TOKEN_ID, "bos_token_id": None}
    config = kind.config(
        text_config=text, vision_config=dict(sizes["vision_config"]), image_token_id=IMAGE_TOKEN_ID,
        tie_word_embeddings=tied, grounding=sizes.get("grounding", {"prompt": {}}),
    )  # fmt: skip
    with no_init_weights():
        model = kind.model(config).eval()
    model.tie_weights()  # which building without initialisation left out
    randomise(model, bfloat16)
    if bfloat16:  # the model itself stays float32, as do its rotary frequencies
        stored = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
        if tied:
            del stored["lm_head.weight"]
        saving["state_dict"] = stored
    model.save_pretrained(folder, **saving)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    qwen3 = model_type == "qwen3_vl"
    write_json(folder / "preprocessor_config.json", PREPROCESSOR_3_JSON if qwen3 else PREPROCESSOR_JSON)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE_3 if qwen3 else CHAT_TEMPLATE})
    return model


# As the hub has it.
PREPROCESSOR_3_JSON = {
    "size": {"longest_edge": PREPROCESSING_3.max_pixels, "shortest_edge": PREPROCESSING_3.min_pixels},
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}  # fmt: skip
PREPROCESSOR_JSON = {**PREPROCESSING.to_config(), "image_processor_type": "Qwen2VLImageProcessor"}


@torch.no_grad()
def randomise(model: torch.nn.Module, bfloat16: bool = False, seed: int = 0) -> None:
    """Random weights of sensible scale; with `bfloat16`, values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(0, 0.3, generator=generator)
        elif weight.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
        elif "embed_tokens" in name:
            weight.normal_(0, 0.5, generator=generator)
        else:
            weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)
        if bfloat16:
            weight.copy_(weight.to(torch.bfloat16))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level fields of a JSON file; None takes one away."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in content.items() if value is not None})


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a checkpoint's tensors, which are in one file."""
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def random_pictures(grids: list[Grid], seed: int = 0, numbers: Preprocessing = PREPROCESSING) -> list[np.ndarray]:
    """Patches (n, patch_dim) of random pixels for each grid."""
    rng = np.random.default_rng(seed)
    patch = numbers.patch_size
    return [patchify(rng.integers(0, 256, (h * patch, w * patch, 3), dtype=np.uint8), numbers)[0] for _, h, w in grids]


def random_prompt(grids: list[Grid], seed: int = 0) -> np.ndarray:
    """Token ids: text, a picture, text, ... and text; every special token but the picture's is left out."""
    rng = np.random.default_rng(seed)
    pieces = [rng.integers(0, TEXT_TOKENS, 5)]
    for grid in grids:
        pieces += [np.full(visual_tokens(grid, 2), IMAGE_TOKEN_ID), rng.integers(0, TEXT_TOKENS, 3)]
    return np.concatenate([*pieces, rng.integers(0, TEXT_TOKENS, 9)]).astype(np.int64)


@torch.no_grad()
def torch_vision(model: PreTrainedModel, patches: list[np.ndarray], grids: list[Grid]) -> list[np.ndarray]:
    """Visual tokens (tokens_i, embedding width) of each picture by transformers."""
    pixels = torch.from_numpy(np.concatenate(patches))
    return visual_tokens_of(model.model.get_image_features(pixels, torch.tensor(grids)))


@torch.no_grad()
def torch_logits(model: PreTrainedModel, ids: np.ndarray, patches: list[np.ndarray], grids: list[Grid]) -> np.ndarray:
    """Logits (tokens, vocab) of a whole sequence by transformers, with its own 3-D positions and no cache."""
    tokens = torch.from_numpy(ids)[None]
    output = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        pixel_values=torch.from_numpy(np.concatenate(patches)),
        image_grid_thw=torch.tensor(grids),
        mm_token_type_ids=tokens.eq(IMAGE_TOKEN_ID).int(),
        use_cache=False,
    )
    logits: np.ndarray = output.logits[0].numpy()
    return logits


def prompt_positions(ids: np.ndarray, grids: list[Grid]) -> np.ndarray:
    """Positions (3, tokens) of such a prompt."""
    return mrope_positions(ids, IMAGE_TOKEN_ID, grids, 2)
