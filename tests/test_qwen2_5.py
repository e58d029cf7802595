"""Qwen2.5-VL's checkpoints: both layouts of their config, their blocks in a row against transformers, quantising."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.bundle import VisionShape
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from quantize.calibration import CalibrationPrompt, _can_be_asked, grounding_prompts
from quantize.checkpoint import open_checkpoint
from quantize.gptq import quantize, read_prompts
from quantize.model_config import read_config
from quantize.rotate import Settings as RotateSettings
from quantize.rotate import rotate
from quantize.smooth import Settings as SmoothSettings
from quantize.smooth import smooth
from quantize.stream import MERGER, stream
from quantize.torch_model import load_model
from tests.checkpoints import (
    TINY_2_5,
    TRUE_2_5_WIDTHS,
    random_pictures,
    torch_vision,
    write_checkpoint,
)
from tests.damage import set_field
from tests.families import READ_BACK, SAMPLES, differences, logits, quantized_names, settings, write_family
from train.world.records import world_records

# (width, height) in pixels. In windows of 2 x 2 tokens: three in a row, the last a column; nine with edges; one token.
SIZES = [(140, 56), (140, 140), (28, 28), (84, 56)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny random checkpoint as transformers' model, and the folder with it and with calibration records."""
    folder = tmp_path_factory.mktemp("qwen2_5")
    return write_family(folder, TINY_2_5, SIZES), folder


def test_the_config_is_read(tiny: tuple[Any, Path]) -> None:
    config = read_config(tiny[1] / "checkpoint")
    assert config.shape.model_type == "qwen2_5_vl"
    assert config.shape.vision == VisionShape(3, 48, 3, 16, 100.0, window=2)
    assert (config.vision_intermediate_size, config.vision_activation) == (56, "silu")
    assert config.full_attention_blocks == (1,)
    assert config.settings.answer_format == AnswerFormat("pixels")


def flatten(folder: Path) -> None:
    """As the hub has it: the decoder's fields at the top, the old names of the rotary ones and of the channels."""
    config = json.loads((folder / "config.json").read_text())
    config |= config.pop("text_config") | {"model_type": "qwen2_5_vl"}
    rope, vision = config.pop("rope_parameters"), config["vision_config"]
    config |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    vision["in_chans"] = vision.pop("in_channels")
    (folder / "config.json").write_text(json.dumps(config))


def test_the_hub_s_config_says_the_same(tiny: tuple[Any, Path], tmp_path: Path) -> None:
    nested = read_config(tiny[1] / "checkpoint")
    shutil.copytree(tiny[1] / "checkpoint", tmp_path / "flat")
    flatten(tmp_path / "flat")
    flat = read_config(tmp_path / "flat")
    assert (flat.shape, flat.full_attention_blocks) == (nested.shape, nested.full_attention_blocks)
    assert (flat.channels, flat.vision_intermediate_size) == (nested.channels, nested.vision_intermediate_size)


def in_vision(field: str, to: Any) -> Callable[[Path], None]:
    return set_field("config.json", "vision_config", field, to=to)


BAD = {
    "activation": (in_vision("hidden_act", "gelu"), "vision hidden_act 'gelu' is not 'silu'"),
    "no width": (in_vision("hidden_size", None), "lacks the field vision_config.hidden_size"),
    "a small window": (in_vision("window_size", 27), "vision window_size is below the 28 pixels of a token"),
    "no window": (in_vision("window_size", None), "lacks the field vision_config.window_size"),
    "blocks": (in_vision("fullatt_block_indexes", [1.5]), "fullatt_block_indexes is .*, not a list of whole numbers"),
    "another width": (
        in_vision("intermediate_size", 64),
        "gate_proj.weight has shape .* they do not belong together",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_cannot_be_used_is_one_sentence(case: str, tiny: tuple[Any, Path], tmp_path: Path) -> None:
    damage, said = BAD[case]
    shutil.copytree(tiny[1] / "checkpoint", tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(GemvgError, match=said):
        open_checkpoint(tmp_path / "bad")


def test_blocks_in_a_row_are_the_model(tiny: tuple[Any, Path]) -> None:
    """Windows and their order included: with nothing changed, the head gives transformers' logits."""
    model, folder = tiny
    checkpoint = open_checkpoint(folder / "checkpoint")
    prompts = read_prompts(settings(folder, "unused"), checkpoint)
    assert {len(prompt.grids) for prompt in prompts} == {1, 2, 3}
    *_, head = stream(checkpoint, prompts)
    for prompt, ours in zip(prompts, head.run(), strict=True):
        assert np.abs(ours.numpy() - logits(model, prompt)).max() < 1e-4


def test_simulated_scenes_ask_what_pixels_can_say(
    tiny: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that shows a box in one of several pictures of several sizes is left out, another takes its place."""
    monkeypatch.setattr("quantize.calibration.SCENES", 12)
    settings = open_checkpoint(tiny[1] / "checkpoint", "qwen2.5-vl").config.settings
    assert len(grounding_prompts(settings, None, tmp_path, 20)) == 20
    asked = [_can_be_asked(settings, record) for record in world_records(tmp_path, 20, 0.5, seed=0)]
    assert 10 < sum(asked) < 20


def test_calibration_answers_are_in_resized_pixels(tiny: tuple[Any, Path]) -> None:
    _, folder = tiny
    checkpoint = open_checkpoint(folder / "checkpoint")
    prompt = read_prompts(settings(folder, "unused"), checkpoint)[0]  # its picture keeps its size
    assert "(2,3),(14,20)" in checkpoint.config.settings.tokenizer.decode(prompt.ids.tolist())


@pytest.mark.parametrize("options", READ_BACK, ids=str)
def test_quantised_checkpoints_are_read_back(tiny: tuple[Any, Path], options: dict[str, Any]) -> None:
    model, folder = tiny
    run = settings(folder, "one-of-many", **options)
    names = quantized_names(run)
    assert "model.language_model.layers.0.mlp.down_proj.qweight" in names
    assert ("model.visual.blocks.0.mlp.gate_proj.qweight" in names) == (run.vision_bits < 16)
    assert ("lm_head.qweight" in names) == (run.head_bits < 16)
    errors = [float(np.sqrt(np.square(wrong).mean())) for wrong in differences(model, folder, run.out)]
    assert 0 < max(errors) < (0.5 if run.bits == 8 else 8)


def test_gptq_is_closer_than_rounding_in_the_vision_tower(tiny: tuple[Any, Path]) -> None:
    """What the windows are for: Hessians of the inputs that a block really gets."""
    model, folder = tiny
    errors = {}
    for method in ("gptq", "rtn"):
        quantize(settings(folder, f"close-{method}", method=method, vision_bits=4, bits=8))
        wrong = differences(model, folder, folder / f"close-{method}")
        errors[method] = np.mean([np.square(one).mean() for one in wrong])
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_a_float_checkpoint_is_loaded_as_it_is(tiny: tuple[Any, Path]) -> None:
    model, folder = tiny
    loaded = load_model(folder / "checkpoint")
    assert type(loaded) is type(model)
    prompt = read_prompts(settings(folder, "unused"), open_checkpoint(folder / "checkpoint"))[0]
    assert np.abs(logits(model, prompt) - logits(loaded, prompt)).max() < 1e-4


def test_smoothed_and_rotated_it_computes_the_same(tiny: tuple[Any, Path]) -> None:
    model, folder = tiny
    smooth(SmoothSettings(folder / "checkpoint", folder / "smoothed", 0.5, SAMPLES, folder / "records.jsonl"))
    rotate(RotateSettings(folder / "smoothed", folder / "rotated"))
    changed = load_file(folder / "rotated" / "model.safetensors")
    name = "model.visual.blocks.0.mlp.down_proj.weight"
    assert not np.array_equal(changed[name], model.state_dict()[name].numpy())
    for wrong in differences(model, folder, folder / "rotated"):
        assert np.abs(wrong).max() < 1e-3


@pytest.mark.slow
def test_two_blocks_of_true_widths_are_transformers(tmp_path: Path) -> None:
    """The vision tower at the 7B's widths and windows, block by block."""
    model = write_checkpoint(tmp_path / "checkpoint", TRUE_2_5_WIDTHS, bfloat16=True, max_shard_size="500MB")
    grids: list[Grid] = [(1, 10, 18), (1, 8, 8), (1, 2, 14)]
    patches = random_pictures(grids)
    expected = np.concatenate(torch_vision(model, patches, grids))
    del model  # or two copies of the weights would be in memory
    none = torch.empty(0, dtype=torch.long)
    pictures = CalibrationPrompt(none, none.expand(3, 0), torch.from_numpy(np.concatenate(patches)), tuple(grids), none)
    try:
        checkpoint = open_checkpoint(tmp_path / "checkpoint")
        assert checkpoint.config.shape.vision == VisionShape(2, 1280, 16, 80, 10000.0, window=4)
        merger = next(block for block in stream(checkpoint, [pictures]) if block.name == MERGER)
        assert np.abs(merger.run_one(0).numpy() - expected).max() < 1e-3
    finally:
        shutil.rmtree(tmp_path / "checkpoint")  # 1 GB is not left to pytest's keeping of the last runs
