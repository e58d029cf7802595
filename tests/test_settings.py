"""Command lines that are made from settings: what they read, what they refuse, and what is recorded of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemvg_edge.errors import GemvgError
from quantize import gptq, rotate
from tests.checkpoints import write_checkpoint
from train import distill, grpo, sft
from train.stage import parse_settings

PATHS = ["--model", "m", "--out", "o"]
DATA = [*PATHS, "--data", "d"]


def parse(monkeypatch: pytest.MonkeyPatch, settings: Any, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    return parse_settings(settings, "train.some", "What it does.")


def test_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--bits", "8", "--group-size", "-1", "--no-sym", "--records", "r.jsonl", "--damping=1e-3", "--overwrite"]
    run = parse(monkeypatch, gptq.Settings, *PATHS, *given)
    assert run == gptq.Settings(
        Path("m"), Path("o"), bits=8, group_size=-1, sym=False, records=Path("r.jsonl"), damping=0.001, overwrite=True
    )
    assert parse(monkeypatch, sft.SftSettings, *DATA, "--seed", str(2**32 - 1)).seed == 2**32 - 1
    assert parse(monkeypatch, grpo.GrpoSettings, *DATA) == grpo.GrpoSettings(Path("m"), Path("d"), Path("o"))
    taught = parse(monkeypatch, distill.DistillSettings, *DATA, "--teacher", "t", "--temperature", "2")
    assert (taught.teacher, taught.temperature, taught.teacher_answers) == (Path("t"), 2.0, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--learning-rate", "nan"], "'nan' is not a number that can be used"),
        (["--learning-rate", "1e400"], "'1e400' is not a number that can be used"),
        (["--learning-rate=-inf"], "'-inf' is not a number that can be used"),
        (["--steps", str(2**31)], f"{2**31} is past {2**31 - 1}"),
        (["--steps", "1e3"], "'1e3' is not a whole number"),
        (["--seed", "-1"], "'-1' is no seed; give a whole number from 0"),
        (["--seed", str(2**32)], "is no seed; give a whole number from 0"),
        (["--schedule", "linear"], "Expected one of ('wsd', 'cosine')"),
        (["--stepz", "3"], "--stepz"),
        (["--muon", "yes"], "yes"),
    ],
)
def test_usage_mistakes_are_told(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, sft.SftSettings, *DATA, *arguments)
    assert ended.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert said in " ".join(errors.replace("│", " ").split())


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, sft.SftSettings, *PATHS)
    assert ended.value.code == 2
    assert "--data PATH" in capsys.readouterr().err


def test_a_stage_replaces_a_result_only_when_that_is_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    run = rotate.Settings(tmp_path / "checkpoint", tmp_path / "out")
    rotate.rotate(run)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(GemvgError, match="out holds a finished result; add --overwrite to replace it, or give another"):
        rotate.rotate(replace(run, seed=1))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    rotate.rotate(replace(run, seed=1, overwrite=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert "overwrite" not in json.loads((tmp_path / "out" / "quantization.json").read_text())


def test_a_killed_run_that_was_to_replace_goes_on_without_being_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    run = rotate.Settings(tmp_path / "checkpoint", tmp_path / "out")
    rotate.rotate(run)
    plain = rotate.rotated_part

    def stop_late(checkpoint: Any, name: str, rotation: Any) -> Any:
        if name == "lm_head":
            raise KeyboardInterrupt
        return plain(checkpoint, name, rotation)

    with monkeypatch.context() as patch:
        patch.setattr(rotate, "rotated_part", stop_late)
        with pytest.raises(KeyboardInterrupt):
            rotate.rotate(replace(run, seed=1, overwrite=True))
    with pytest.raises(GemvgError, match=r"other settings \(--seed was 1, now 2\)"):
        rotate.rotate(replace(run, seed=2))
    rotate.rotate(replace(run, seed=1))
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["seed"] == 1
