"""The 7B's script goes on where it was killed. Its commands are played: none can run here, and other tests run each."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bench.readme import ROOT

# What a command of the workshop leaves behind: the last `-m` names it, --out or an operand where it writes.
PLAYED = """#!/usr/bin/env bash
[ "$1" = -c ] && exit 0
words=("$@") out= module=
for k in "${!words[@]}"; do
    [ "${words[k]}" = -m ] && module=${words[k + 1]} operands=("${words[@]:k + 2}")
    [ "${words[k]}" = --out ] && out=${words[k + 1]}
done
case $module in
    train.data.inspect) out=${operands[2]} ;;
    train.data.mix) out=${operands[0]} ;;
    train.teacher) out=${operands[2]} ;;
    train.vocabulary | export.to_onnx) out=${operands[1]} ;;
    bench.accuracy | bench.compare) exit 0 ;;
esac
echo "$module ${out##*/}" >> "$CALLS"
[ "$module ${out##*/}" = "$KILL" ] && kill -9 "$PPID" && exit 137
case $out in
    *.jsonl | *.html) touch "$out" ;;
    *) mkdir -p "$out"; touch "$out/config.json" "$out/manifest.json" ;;
esac
"""
STAGES = [
    "train.data.compose mg240k.jsonl",
    "train.data.convert mgrounding.jsonl",
    "train.data.convert refcoco.jsonl",
    "train.data.convert llava.jsonl",
    "train.data.inspect mg240k.html",
    "train.data.mix stage1.jsonl",
    "train.sft stage1",
    "train.data.mix cot-questions.jsonl",
    "train.teacher cot.jsonl",
    "train.data.mix stage2.jsonl",
    "train.sft stage2",
    "train.grpo gemvg",
    "train.distill 2b",
    "train.vocabulary 2b-grown",
    "train.sft 2b-locations",
    "quantize.gptq 2b-locations.gptq",
    "export.to_onnx 2b-locations.int4",
]


def run(folder: Path, kill: str = "") -> tuple[int, list[str]]:
    """How the script ended, and what it ran."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(PLAYED)
    python.chmod(0o755)
    for name in ("llava", "mig-bench"):
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
    calls.write_text("")
    names = {"BASE": "7b", "BASE_2B": "2b", "DATA": str(folder / "data"), "RUNS": str(folder / "runs")}
    settings = {**os.environ, **names, "PYTHON": str(python), "CALLS": str(calls), "KILL": kill}
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "pipeline_7b.sh")], env=settings, capture_output=True, text=True, check=False
    )
    return done.returncode, calls.read_text().splitlines()


def test_it_runs_every_stage_once(tmp_path: Path) -> None:
    assert run(tmp_path) == (0, STAGES)
    assert run(tmp_path) == (0, [])


@pytest.mark.parametrize("number", range(len(STAGES)), ids=STAGES)
def test_killed_in_a_stage_it_goes_on_there(tmp_path: Path, number: int) -> None:
    code, before = run(tmp_path, kill=STAGES[number])
    assert code != 0
    assert before == STAGES[: number + 1]
    assert run(tmp_path) == (0, STAGES[number:])
