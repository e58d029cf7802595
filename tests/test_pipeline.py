"""The small pipeline's script, every stage of it at a two-thousandth of its length."""

from __future__ import annotations

import json
import os
import subprocess
from itertools import product
from pathlib import Path

import pytest

from bench.readme import ROOT
from tests.forking_python import forking_python

STAGES = ("stage1", "stage2", "student", "student-digits", "cold-start", "grpo", "grpo-cot", "grpo-direct")


def _run(settings: dict[str, str]) -> str:
    command = ["bash", str(ROOT / "examples" / "pipeline_tiny.sh")]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_every_stage_runs_and_a_second_call_keeps_them(tmp_path: Path) -> None:
    """Twelve stages, each a process of its own: a minute or two."""
    settings = {
        "SCALE": "2000", "SFT_BATCH": "2", "RL_BATCH": "2",
        "OUT": str(tmp_path / "runs"), "DATA": str(tmp_path / "world"),
        # It ends its answers; random weights write on to the limit, which took a third of the time.
        "START": str(ROOT / "checkpoints" / "tabletop"), "SAVE": str(tmp_path / "stages.json"),
    }  # fmt: skip
    with forking_python(tmp_path / "bin") as python:
        first, again = (_run(settings | {"PYTHON": str(python)}) for _ in range(2))
    for stage in (*STAGES, "int4"):
        assert f"== {stage}\n" in first
        assert f"== {stage}: done before" in again
    stated = json.loads((tmp_path / "runs" / "bundles" / "int4" / "manifest.json").read_text())["weights"]
    assert stated["decoder"] == "int4-gptq-g32"
    result = json.loads((tmp_path / "stages.json").read_text())
    assert {row["stage"] for row in result["rows"]} == set(STAGES)
    assert {(row["stage"], row["mode"]) for row in result["rows"]} >= {("grpo", "cot"), ("grpo", "direct")}
    sizes = {row["stage"]: row["parameters"] for row in result["rows"]}
    assert sizes["student"] <= sizes["grpo"] / 2
    assert len(result["gains"]) == 11
    sampled = json.loads((tmp_path / "sampled.json").read_text())
    told = [(row["stage"], row["mode"], row["temperature"]) for row in sampled["rows"] if "reward_gain" in row]
    assert sorted(told) == sorted(product(("grpo", "grpo-cot", "grpo-direct"), ("direct", "cot"), (0, 0.7)))
