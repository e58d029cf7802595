"""Qwen3-VL's checkpoints: both layouts of their config, their blocks in a row against transformers, quantising."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.bundle import VisionShape
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import patchify, resize
from gemvg_edge.prompt import PromptTemplate
from quantize.checkpoint import open_checkpoint
from quantize.gptq import quantize, read_prompts
from quantize.model_config import read_config
from quantize.rotate import Settings as RotateSettings
from quantize.rotate import rotate
from quantize.smooth import Settings as SmoothSettings
from quantize.smooth import smooth
from quantize.stream import block_names, stream
from tests.checkpoints import PREPROCESSING_3, TINY_3, edit_json, edit_tensors
from tests.damage import set_field
from tests.families import READ_BACK, SAMPLES, differences, logits, quantized_names, settings, write_family
from train.checkpoint import read_settings, read_trainable

SIZES = [(160, 64), (160, 160), (32, 32), (96, 64)]  # (width, height) in pixels


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny random checkpoint as transformers' model, and the folder with it and with calibration records."""
    folder = tmp_path_factory.mktemp("qwen3")
    return write_family(folder, TINY_3, SIZES), folder


def test_the_config_is_read(tiny: tuple[Any, Path]) -> None:
    config = read_config(tiny[1] / "checkpoint")
    shape = config.shape
    assert (shape.model_type, shape.mrope_interleaved, shape.mrope_section) == ("qwen3_vl", True, (8, 4, 4))
    assert (shape.hidden_size, shape.heads, shape.head_dim) == (96, 4, 32)
    assert (shape.deepstack, shape.embedding_width, config.deepstack_blocks) == (2, 3 * 96, (0, 2))
    assert shape.vision == VisionShape(4, 48, 2, 24, 100.0, place_side=5)
    assert (config.vision_intermediate_size, config.vision_activation) == (56, "gelu_pytorch_tanh")
    assert config.settings.preprocessing == PREPROCESSING_3
    assert config.settings.answer_format == AnswerFormat("json")


def as_the_hub_has_it(folder: Path) -> None:
    """The rotary numbers by their old names, no sizes of the vision tower's rotary embedding."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    del config["grounding"], config["vision_config"]["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))


def test_the_hub_s_config_says_the_same_and_has_the_family_s_profile(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    saved = read_config(tiny[1] / "checkpoint")
    shutil.copytree(tiny[1] / "checkpoint", tmp_path / "Qwen3-VL-2B-Instruct")
    as_the_hub_has_it(tmp_path / "Qwen3-VL-2B-Instruct")
    hub = read_config(tmp_path / "Qwen3-VL-2B-Instruct")
    assert (hub.shape.rope_theta, hub.shape.mrope_section) == (saved.shape.rope_theta, saved.shape.mrope_section)
    assert hub.shape.vision.rope_theta == 10_000
    found = read_settings(tmp_path / "Qwen3-VL-2B-Instruct")
    assert (found.profile, found.answer_format) == ("qwen3-vl", AnswerFormat("json", unnamed="each"))
    assert not found.template.system_turn
    assert 'that matches the description "{query}" in the image' in found.template.query


@pytest.mark.parametrize("size", [(160, 64), (33, 700), (20, 20), (640, 480)])
def test_pictures_become_the_patches_that_transformers_makes(size: tuple[int, int], tiny: tuple[Any, Path]) -> None:
    numbers = read_settings(tiny[1] / "checkpoint").preprocessing
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tiny[1] / "checkpoint")(images=[picture], return_tensors="np")
    patches, grid = patchify(resize(picture, numbers), numbers)
    assert theirs["image_grid_thw"].tolist() == [list(grid)]
    assert np.abs(patches - theirs["pixel_values"]).max() < 1e-6


def in_config(*keys: str, to: Any) -> Callable[[Path], None]:
    return set_field("config.json", *keys, to=to)


def in_vision(field: str, to: Any) -> Callable[[Path], None]:
    return in_config("vision_config", field, to=to)


def in_text(field: str, to: Any) -> Callable[[Path], None]:
    return in_config("text_config", field, to=to)


ROPE = ("text_config", "rope_parameters")
BAD = {
    "activation": (in_vision("hidden_act", "gelu"), "vision hidden_act 'gelu' is not 'gelu_pytorch_tanh'"),
    "no places": (in_vision("num_position_embeddings", None), "lacks the field vision_config.num_position_embeddings"),
    "no square of places": (in_vision("num_position_embeddings", 24), "num_position_embeddings is 24, no square"),
    "another square": (
        in_vision("num_position_embeddings", 16),
        "pos_embed.weight has shape .* they do not belong",
    ),
    "no deepstack": (in_vision("deepstack_visual_indexes", None), "lacks the field vision_config.deepstack_visual_ind"),
    "a block past the last": (
        in_vision("deepstack_visual_indexes", [0, 4]),
        "deepstack_visual_indexes is 4, not 0 to",
    ),
    "blocks in disorder": (in_vision("deepstack_visual_indexes", [2, 0]), r"are \[2, 0\], not up to 16 blocks in asc"),
    "a block twice": (in_vision("deepstack_visual_indexes", [2, 2]), r"are \[2, 2\], not up to 16 blocks in ascending"),
    "fewer blocks": (in_vision("deepstack_visual_indexes", [2]), "describes a model without it; take both from one"),
    "more blocks than layers": (
        in_vision("deepstack_visual_indexes", [0, 1, 2, 3]),
        "has 4 blocks, more than the",
    ),
    "another patch": (in_vision("patch_size", 14), "vision patch_size is 14, but preprocessor_config.json says 16"),
    "no width of heads": (in_text("head_dim", None), "lacks the field text_config.head_dim"),
    "heads of an odd width": (
        in_text("head_dim", 24),
        "heads of 24 numbers; the fused attention takes",
    ),
    "heads of another width": (in_text("head_dim", 16), "mrope_section is .*; it needs three numbers with the sum 8"),
    "biases": (in_text("attention_bias", True), "attention_bias is true; Qwen3-VL's attention has no biases"),
    "not interleaved": (
        in_config(*ROPE, "mrope_interleaved", to=False),
        "mrope_interleaved is false, unlike in every Q",
    ),
    "partial": (in_config(*ROPE, "partial_rotary_factor", to=0.5), "partial or interleaved rotary positions are"),
    "no sections": (in_config(*ROPE, "mrope_section", to=None), "lacks the field text_config.rope_parameters.mrope_s"),
    "a mixture of experts": (in_config("model_type", to="qwen3_vl_moe"), "unknown model type 'qwen3_vl_moe'; this gem"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_cannot_be_used_is_one_sentence(case: str, tiny: tuple[Any, Path], tmp_path: Path) -> None:
    damage, said = BAD[case]
    shutil.copytree(tiny[1] / "checkpoint", tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(GemvgError, match=said):
        open_checkpoint(tmp_path / "bad")


@pytest.mark.parametrize(
    "name",
    [
        "visual.pos_embed.weight",
        "visual.deepstack_merger_list.1.norm.bias",
        "visual.patch_embed.proj.bias",
        "language_model.layers.2.self_attn.k_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, tiny: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny[1] / "checkpoint", tmp_path / "bad")
    edit_tensors(tmp_path / "bad", lambda tensors: tensors.pop(f"model.{name}"))
    with pytest.raises(GemvgError, match=f"no tensor .*{name.removeprefix('language_model.')}; the checkpoint is inc"):
        open_checkpoint(tmp_path / "bad")


def test_it_is_not_trained(tiny: tuple[Any, Path]) -> None:
    with pytest.raises(GemvgError, match="is a qwen3_vl, which cannot be trained here; give a qwen2_vl checkpoint"):
        read_trainable(tiny[1] / "checkpoint")


def test_blocks_in_a_row_are_the_model(tiny: tuple[Any, Path]) -> None:
    """Places and deepstack included: with nothing changed, the head gives transformers' logits."""
    model, folder = tiny
    checkpoint = open_checkpoint(folder / "checkpoint")
    prompts = read_prompts(settings(folder, "unused"), checkpoint)
    assert {len(prompt.grids) for prompt in prompts} == {1, 2, 3}
    *_, head = stream(checkpoint, prompts)
    for prompt, ours in zip(prompts, head.run(), strict=True):
        assert np.abs(ours.numpy() - logits(model, prompt)).max() < 1e-4


@pytest.mark.parametrize(
    "stop", ["visual.deepstack_merger_list.1", "visual.blocks.3", "model.layers.0", "model.layers.1", "model.layers.2"]
)
def test_a_killed_stream_goes_on_with_its_features(stop: str, tiny: tuple[Any, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny[1] / "checkpoint")
    prompts = read_prompts(settings(tiny[1], "unused"), checkpoint)[:2]
    *_, whole = stream(checkpoint, prompts)
    for block in stream(checkpoint, prompts, work=tmp_path):
        if block.name == stop:
            break
    first, *_, last = stream(checkpoint, prompts, work=tmp_path)
    assert first.name == stop
    for ours, theirs in zip(last.run(), whole.run(), strict=True):
        assert torch.equal(ours, theirs)


def test_deepstack_mergers_follow_their_blocks(tiny: tuple[Any, Path]) -> None:
    names = [name.removeprefix("visual.") for name in block_names(open_checkpoint(tiny[1] / "checkpoint"))]
    first, second = (f"deepstack_merger_list.{k}" for k in range(2))
    assert names[:6] == ["blocks.0", first, "blocks.1", "blocks.2", second, "blocks.3"]


@pytest.mark.parametrize("options", READ_BACK, ids=str)
def test_quantised_checkpoints_are_read_back(tiny: tuple[Any, Path], options: dict[str, Any]) -> None:
    model, folder = tiny
    run = settings(folder, "one-of-many", **options)
    names = quantized_names(run)
    assert "model.language_model.layers.0.mlp.down_proj.qweight" in names
    assert {"model.visual.pos_embed.weight", "model.language_model.layers.0.self_attn.q_norm.weight"} <= names
    for layer in ("blocks.0.mlp.linear_fc1", "deepstack_merger_list.1.linear_fc2"):
        assert (f"model.visual.{layer}.qweight" in names) == (run.vision_bits < 16)
    assert ("lm_head.qweight" in names) == (run.head_bits < 16)
    errors = [float(np.sqrt(np.square(wrong).mean())) for wrong in differences(model, folder, run.out)]
    assert 0 < max(errors) < (0.5 if run.bits == 8 else 8)


def test_gptq_is_closer_than_rounding(tiny: tuple[Any, Path]) -> None:
    """Hessians of the inputs that a block really gets, with their places and deepstack features."""
    model, folder = tiny
    errors = {}
    for method in ("gptq", "rtn"):
        quantize(settings(folder, f"close-{method}", method=method, vision_bits=4))
        wrong = differences(model, folder, folder / f"close-{method}")
        errors[method] = np.mean([np.square(one).mean() for one in wrong])
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_smoothed_and_rotated_it_computes_the_same(tiny: tuple[Any, Path]) -> None:
    model, folder = tiny
    smooth(SmoothSettings(folder / "checkpoint", folder / "smoothed", 0.5, SAMPLES, folder / "records.jsonl"))
    rotate(RotateSettings(folder / "smoothed", folder / "rotated"))
    changed = load_file(folder / "rotated" / "model.safetensors")
    for name in ("blocks.0.mlp.linear_fc1", "deepstack_merger_list.1.linear_fc1", "deepstack_merger_list.1.linear_fc2"):
        name = f"model.visual.{name}.weight"
        assert not np.array_equal(changed[name], model.state_dict()[name].numpy())
    for wrong in differences(model, folder, folder / "rotated"):
        assert np.abs(wrong).max() < 1e-3


def test_a_system_turn_is_written_where_a_checkpoint_has_one(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    shutil.copytree(tiny[1] / "checkpoint", tmp_path / "told")
    edit_json(tmp_path / "told" / "config.json", grounding={"prompt": {"system": "Find things."}})
    assert read_settings(tmp_path / "told").template == PromptTemplate("Find things.")
