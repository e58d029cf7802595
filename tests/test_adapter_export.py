"""LoRA folders given to the commands: exported and quantised as the checkpoint that peft's merge saves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.to_onnx import main as export
from export.verify import main as verify
from gemvg_edge.bundle import open_bundle
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from quantize.rotate import Settings as RotateSettings
from quantize.rotate import rotate
from quantize.smooth import Settings as SmoothSettings
from quantize.smooth import smooth
from quantize.tensors import EMBEDDING
from tests.adapters import write_adapter, write_base_and_adapter, write_merged
from tests.checkpoints import (
    GROUPED,
    edit_json,
    write_checkpoint,
)
from tests.test_gptq import write_prompts
from train.checkpoint import CONFIG, HEAD


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an adapter of it."""
    folder = tmp_path_factory.mktemp("adapters")
    write_base_and_adapter(folder)
    write_checkpoint(folder / "tied", GROUPED, tied=True)
    return folder


@pytest.mark.parametrize(
    "options", [[], ["--weights", "int4"], ["--dialect", "standard", "--precision", "float16"]], ids=str
)
def test_an_adapter_is_exported_as_its_merge(
    options: list[str], bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte what is exported of the checkpoint that peft saved."""
    base = bases / "whole"
    write_merged(tmp_path / "merged", bases / "adapter", base)
    given = bases / "adapter"
    assert export([str(given), str(tmp_path / "ours" / "bundle"), *options]) == 0
    assert export([str(tmp_path / "merged"), str(tmp_path / "theirs" / "bundle"), *options]) == 0
    files = [open_bundle(tmp_path / side / "bundle").manifest.files for side in ("ours", "theirs")]
    assert files[0] == files[1]
    assert f"; {given} merged into {base}\n" in capsys.readouterr().err
    assert verify([str(tmp_path / "ours" / "bundle"), "--against", str(given), "--base", str(base)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["passed"] is True
    assert verify([str(tmp_path / "ours" / "bundle"), "--against", str(base)]) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_that_was_parted_is_exported(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(
        tmp_path / "adapter", bases / "tied", r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    assert export([str(tmp_path / "adapter"), str(tmp_path / "bundle")]) == 0
    capsys.readouterr()
    assert verify([str(tmp_path / "bundle"), "--against", str(tmp_path / "adapter")]) == 0
    rotate(RotateSettings(tmp_path / "adapter", tmp_path / "rotated"))
    quantize(quantised_settings(tmp_path, model=tmp_path / "adapter", method="rtn"))
    assert json.loads((tmp_path / "codes" / CONFIG).read_text())["tie_word_embeddings"] is False
    assert np.array_equal(
        open_checkpoint(tmp_path / "codes").read(HEAD), open_checkpoint(bases / "tied").read(EMBEDDING)
    )


def quantised_settings(folder: Path, model: Path, **options: Any) -> Settings:
    common: dict[str, Any] = {"records": folder / "records.jsonl", "samples": 2, "group_size": 32, "device": "cpu"}
    return Settings(model, options.pop("out", folder / "codes"), **common, **options)


def test_quantising_an_adapter_is_quantising_its_merge(bases: Path, tmp_path: Path) -> None:
    write_prompts(tmp_path)
    base = bases / "whole"
    write_merged(tmp_path / "merged", bases / "adapter", base)
    common: dict[str, Any] = {"records": tmp_path / "records.jsonl", "samples": 2, "device": "cpu"}
    runs: list[tuple[Callable[[Any], None], Any]] = [
        (quantize, quantised_settings(tmp_path, model=bases / "adapter")),
        (smooth, SmoothSettings(bases / "adapter", tmp_path / "smooth", **common)),
        (rotate, RotateSettings(bases / "adapter", tmp_path / "rotated", base=base)),
    ]
    for run, settings in runs:
        run(settings)
        theirs = replace(
            settings, model=tmp_path / "merged", base=None, out=settings.out / "../of-the-merge" / settings.out.name
        )
        run(theirs)
        ours, expected = (load_file(out / "model.safetensors") for out in (settings.out, theirs.out))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
        assert (settings.out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        record = json.loads((settings.out / "quantization.json").read_text())
        assert (record["model"], record["base"]) == (str(bases / "adapter"), str(base))
    with pytest.raises(GemvgError, match=r"lies in .*whole, which is read"):
        quantize(quantised_settings(tmp_path, model=bases / "adapter", out=base / "codes"))


def test_what_is_rewritten_of_a_bfloat16_base_keeps_the_digits_of_the_merge(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", GROUPED, bfloat16=True)
    write_adapter(tmp_path / "adapter", tmp_path / "base", r=4, target_modules=["q_proj", "fc1"])
    quantize(quantised_settings(tmp_path, tmp_path / "adapter", method="rtn"))
    merged, codes = open_checkpoint(tmp_path / "adapter"), open_checkpoint(tmp_path / "codes")
    for part, stored in (("fc1", "float32"), ("fc2", "bfloat16")):
        name = f"visual.blocks.0.mlp.{part}.weight"
        assert codes.dtype(name).name == stored
        assert np.array_equal(codes.read(name), merged.read(name))


def test_settings_of_a_trainer_beside_an_adapter_are_no_obstacle(bases: Path, tmp_path: Path) -> None:
    """Trainers save tokenizer and processor along, some the base's config too; the base's own count."""
    folder = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.json", CONFIG):
        shutil.copyfile(bases / "whole" / name, folder / name)
    edit_json(folder / "preprocessor_config.json", max_pixels=28 * 28 * 9, min_pixels=28 * 28 * 2)
    opened = open_checkpoint(folder)
    assert opened.config == replace(open_checkpoint(bases / "whole").config, settings=opened.config.settings)
    assert opened.config.settings.preprocessing.max_pixels == 28 * 28 * 64
    assert export([str(folder), str(tmp_path / "bundle")]) == 0


def test_a_template_of_its_own_is_compared(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}ask: {% endfor %}")
    assert export([str(folder), str(tmp_path / "bundle")]) == 2
    assert "adapter/chat_template.jinja: the chat template writes" in capsys.readouterr().err
