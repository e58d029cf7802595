"""A student made of its teacher's layers and channels: what it keeps, and what it may lose without any change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from gemvg_edge.errors import GemvgError
from tests.checkpoints import (
    TINY,
    edit_json,
    random_pictures,
    random_prompt,
    torch_logits,
    write_checkpoint,
)
from train.student import main, make_student

GRIDS = [(1, 4, 4), (1, 4, 6)]


def sizes(decoder: int, vision: int) -> dict[str, Any]:
    return {
        "text_config": TINY["text_config"] | {"num_hidden_layers": decoder},
        "vision_config": TINY["vision_config"] | {"depth": vision},
    }


def load(folder: Path) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits(model: Qwen2VLForConditionalGeneration) -> torch.Tensor:
    return torch.from_numpy(torch_logits(model, random_prompt(GRIDS), random_pictures(GRIDS), GRIDS))


@torch.no_grad()
def resave(folder: Path, model: Qwen2VLForConditionalGeneration, **saving: Any) -> None:
    model.save_pretrained(folder, **saving)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}])
def test_layers_that_do_nothing_are_not_missed(tmp_path: Path, tied: bool, shards: dict[str, Any]) -> None:
    model = write_checkpoint(tmp_path / "teacher", sizes(5, 4), tied=tied, **shards)
    text, vision = model.model.language_model.layers, model.model.visual.blocks
    with torch.no_grad():  # of 5 the layers 0, 2 and 4 stay, of 4 the blocks 0 and 3
        for part in (text[1].self_attn.o_proj, text[3].self_attn.o_proj, text[1].mlp.down_proj, text[3].mlp.down_proj):
            part.weight.zero_()
        for block in (vision[1], vision[2]):
            for part in (block.attn.proj, block.mlp.fc2):
                part.weight.zero_()
                part.bias.zero_()
    resave(tmp_path / "teacher", model, **shards)
    make_student(tmp_path / "teacher", tmp_path / "student", 3, 2, None)
    torch.testing.assert_close(logits(load(tmp_path / "student")), logits(model), atol=1e-4, rtol=1e-4)
    record = json.loads((tmp_path / "student" / "training.json").read_text())
    assert (record["decoder_layers"], record["vision_layers"]) == ([0, 2, 4], [0, 3])
    student = load(tmp_path / "student")
    assert sum(weight.numel() for weight in student.parameters()) == record["parameters"]
    assert len(student.config.text_config.layer_types) == 3


def test_channels_that_do_nothing_are_not_missed(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "teacher")
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.up_proj.weight[3::4] = 0  # a quarter of 104
            layer.mlp.down_proj.weight *= 100  # the product sees through such a rescaling
            layer.mlp.gate_proj.weight[0::4] /= 50
    resave(tmp_path / "teacher", model)
    make_student(tmp_path / "teacher", tmp_path / "student", None, None, 78)
    student = load(tmp_path / "student")
    assert student.config.text_config.intermediate_size == 78
    torch.testing.assert_close(logits(student), logits(model), atol=1e-4, rtol=1e-4)


def test_a_student_of_the_teachers_own_size_is_the_teacher(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "teacher", bfloat16=True)
    make_student(tmp_path / "teacher", tmp_path / "student", 3, 2, 104)
    torch.testing.assert_close(logits(load(tmp_path / "student")), logits(model), atol=1e-4, rtol=1e-4)
    for name in ("tokenizer.json", "preprocessor_config.json", "generation_config.json"):
        assert (tmp_path / "student" / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes()


def test_a_config_as_qwen_publishes_it(tmp_path: Path) -> None:
    """The decoder's fields at the top, and no layer_types."""
    write_checkpoint(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    text = {key: value for key, value in config.pop("text_config").items() if key not in ("layer_types", "model_type")}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({**text, **config}))
    before = load(tmp_path / "teacher")
    make_student(tmp_path / "teacher", tmp_path / "student", 2, 1, 50)
    student = load(tmp_path / "student")
    assert (student.config.text_config.num_hidden_layers, student.config.vision_config.depth) == (2, 1)
    assert torch.equal(student.model.visual.blocks[0].mlp.fc1.weight, before.model.visual.blocks[0].mlp.fc1.weight)
    last, teachers = student.model.language_model.layers[1], before.model.language_model.layers[2]
    assert torch.equal(last.self_attn.q_proj.weight, teachers.self_attn.q_proj.weight)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--decoder-layers", "0"], "--decoder-layers 0: the teacher has 3; give 1 to 3"),
        (["--decoder-layers", "4"], "--decoder-layers 4: the teacher has 3"),
        (["--vision-layers", "-1"], "--vision-layers -1: the teacher has 2"),
        (["--intermediate", "0"], "--intermediate 0: the teacher has 104"),
        (["--intermediate", "105"], "--intermediate 105: the teacher has 104"),
    ],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, flags: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "teacher")
    monkeypatch.setattr("sys.argv", ["student", str(tmp_path / "teacher"), str(tmp_path / "student"), *flags])
    with pytest.raises(SystemExit):
        main()
    assert problem in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "student").exists()


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match="no such checkpoint folder"):
        make_student(tmp_path / "nothing", tmp_path / "student", 1, 1, None)
    write_checkpoint(tmp_path / "teacher")
    (tmp_path / "file").write_text("")
    with pytest.raises(GemvgError, match="file is a file; give a folder to write to"):
        make_student(tmp_path / "teacher", tmp_path / "file", 1, 1, None)
    edit_json(tmp_path / "teacher" / "config.json", quantization_config={"bits": 4})
    with pytest.raises(GemvgError, match="is quantised"):
        make_student(tmp_path / "teacher", tmp_path / "student", 1, 1, None)
