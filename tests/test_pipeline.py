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

STAGES = ("stage1", "stage2", "student", "bare", "student-digits")
FURTHER = ("cold-start", "grpo-1", "more-sft-1")


def _run(settings: dict[str, str]) -> str:
    command = ["bash", str(ROOT / "examples" / "pipeline_tiny.sh")]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_random_weights_become_a_bundle(tmp_path: Path) -> None:
    """The tower, the words, and on to the bundle; with so few steps its answers mean nothing."""
    settings = {
        "SCALE": "2000", "SFT_BATCH": "2", "UNTIL": "bundle", "START": "",
        "OUT": str(tmp_path / "runs"), "DATA": str(tmp_path / "world"),
    }  # fmt: skip
    with forking_python(tmp_path / "bin") as python:
        said = _run(settings | {"PYTHON": str(python)})
    assert [line for line in said.splitlines() if line.startswith("==")] == [
        f"== {stage}" for stage in ("start", "tower", "words", "stage1", "stage2", "int4")
    ]
    assert json.loads((tmp_path / "runs" / "bundles" / "int4" / "manifest.json").read_text())["weights"]["decoder"]
    assert not (tmp_path / "runs" / "cut").exists()


@pytest.mark.slow
def test_every_stage_runs_and_a_second_call_keeps_them(tmp_path: Path) -> None:
    """A dozen stages, each a process of its own: a minute or two."""
    settings = {
        "SCALE": "2000", "SFT_BATCH": "2", "RL_BATCH": "2", "SEEDS": "1", "SPLITS": "held-out",
        "OUT": str(tmp_path / "runs"), "DATA": str(tmp_path / "world"),
        # It ends its answers; random weights write on to the limit, which took a third of the time.
        "START": str(ROOT / "checkpoints" / "tabletop"), "SAVE": str(tmp_path / "stages.json"),
    }  # fmt: skip
    with forking_python(tmp_path / "bin") as python:
        first, again = (_run(settings | {"PYTHON": str(python)}) for _ in range(2))
    for stage in (*STAGES, *FURTHER, "int4"):
        assert f"== {stage}\n" in first
        assert f"== {stage}: done before" in again
    stated = json.loads((tmp_path / "runs" / "bundles" / "int4" / "manifest.json").read_text())["weights"]
    assert stated["decoder"] == "int4-gptq-g32"
    result = json.loads((tmp_path / "stages.json").read_text())
    assert {row["stage"] for row in result["rows"]} == set(STAGES)
    assert {(row["mode"], row["split"]) for row in result["rows"] if row["stage"] == "stage2"} == set(
        product(("direct", "cot"), ("held-out",))
    )
    sizes = {row["stage"]: row["parameters"] for row in result["rows"]}
    assert sizes["student"] <= sizes["stage2"] / 2
    assert [(gain["stage"], gain["mode"], gain["split"]) for gain in result["gains"]] == [
        (stage, "direct", "held-out") for stage in ("stage2", "bare", "student", "student-digits")
    ]
    further = json.loads((tmp_path / "further.json").read_text())
    told = [(mode, row["arm"], row["over"]) for mode in further["modes"] for row in further["modes"][mode]["rows"]]
    pairs = (("grpo", "start"), ("more-sft", "start"), ("grpo", "more-sft"))
    assert sorted(told) == sorted((mode, *pair) for mode, pair in product(("direct", "cot"), pairs))
