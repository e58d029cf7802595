"""Training in two processes, under DeepSpeed's ZeRO-3 and plainly: what is written is whole, and the same.

Launched as examples/pipeline_7b.sh does it, with gloo in NCCL's place.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.readme import ROOT
from export.to_onnx import main as export
from export.verify import main as verify
from gemvg_edge.boxes import Box
from quantize.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint, write_json
from tests.forking_python import forking_python
from tests.training import weights
from train.data.record import Record, write_records
from train.student import make_student
from train.world.records import world_records
from train.world.render import render

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed"),
]
ACCELERATE = (
    "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no",
    "--main_process_port", "0", "--use_deepspeed", "--zero_stage", "3", "--zero3_save_16bit_model",
)  # fmt: skip
Whole = Callable[[str], Path]
# Sums over two processes round otherwise than over one; AdamW's first steps are as large for the smallest gradient.
ATOL, RTOL = 2e-4, 1e-3
SFT = (
    "--batch", "1", "--steps", "8", "--save-steps", "2", "--warmup-steps", "1", "--schedule", "cosine",
    "--learning-rate", "1e-3", "--no-bf16",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`start` and `student`, tiny and random, the shipped model's scenes, and records for both kinds."""
    folder, rng = tmp_path_factory.mktemp("processes"), np.random.default_rng(0)
    write_checkpoint(folder / "start")
    write_json(folder / "start" / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    make_student(folder / "start", folder / "student", 2, 1, 52)
    records = []
    for k in range(6):
        paths = tuple(folder / f"{k}-{n}.png" for n in range(1 + k % 2))
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(path)
        box = Box(0, 1.0 + k, 5.0, 40.0, 50.0)
        records.append(Record(paths, ((96, 64),) * len(paths), "the red mug", (box,), "referential", "test"))
    write_records(records, folder / "records.jsonl")
    return folder


@pytest.fixture(scope="module")
def python(folder: Path) -> Iterator[Path]:
    # Both are DeepSpeed's: what it computes on, and that it shall not compile a faster all-reduce for half a minute.
    with forking_python(folder / "bin", "tests.gloo_only", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="") as python:
        yield python


def start(python: Path, *arguments: object, launcher: Sequence[str] | None = None) -> subprocess.Popen[str]:
    """`accelerate launch` with two processes of a module and its arguments, all of them forks."""
    launcher = launcher or (*ACCELERATE, "true")
    number = "--nproc_per_node" if launcher[0].startswith("torch") else "--num_processes"
    command = [python, "-m", launcher[0], number, "2", *launcher[1:], "-m", *arguments]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHON_EXEC": str(python), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def launch(python: Path, *arguments: object, launcher: Sequence[str] | None = None, fails: bool = False) -> str:
    """The same to its end; what it said."""
    process = start(python, *arguments, launcher=launcher)
    said, _ = process.communicate(timeout=300)
    assert bool(process.returncode) == fails, said[-4000:]
    return said


def sft(folder: Path, out: str) -> tuple[object, ...]:
    return "train.sft", "--model", folder / "start", "--data", folder / "records.jsonl", "--out", folder / out, *SFT


def distillation(folder: Path, out: str) -> tuple[object, ...]:
    teacher = "train.distill", "--teacher", folder / "start"
    return *teacher, *sft(folder, out)[1:], "--model", folder / "student", "--steps", 4


def grpo(folder: Path, out: str) -> tuple[object, ...]:
    """Of the shipped model, whose answers differ in what they earn."""
    if not (folder / "scenes.jsonl").is_file():
        render(folder / "scenes", first_seed=0, scenes=2, size=128, processes=1)
        write_records(world_records(folder / "scenes", 8, cot_share=0, seed=0), folder / "scenes.jsonl")
    return (
        "train.grpo", "--model", ROOT / "checkpoints" / "tabletop", "--data", folder / "scenes.jsonl", "--out",
        folder / out, "--steps", 4, "--save-steps", 2, "--batch", 2, "--generations", 4, "--device-batch", 4,
        "--max-new-tokens", 24, "--learning-rate", "1e-3", "--temperature", "1.5", "--cot-share", 0, "--no-bf16",
        "--no-freeze-vision",
    )  # fmt: skip


STAGES = {"sft": sft, "distillation": distillation, "grpo": grpo}


@pytest.fixture(scope="module")
def whole(folder: Path, python: Path) -> Whole:
    """Where a stage's result is, under ZeRO-3 and in one go."""

    def run(stage: str) -> Path:
        if not (folder / stage).exists():
            launch(python, *STAGES[stage](folder, stage))
        return folder / stage

    return run


def difference(one: Path, other: Path) -> None:
    """AssertionError unless two checkpoints have the same weights, roughly."""
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=ATOL, rtol=RTOL, msg=name)


def check_whole(start: Path, out: Path, tmp_path: Path) -> None:
    """What is at `out` has learned, and transformers, quantize, export and its check all take it."""
    before, after = weights(start), weights(out)
    assert before.keys() == after.keys()
    assert all(tensor.isfinite().all() and tensor.shape == before[name].shape for name, tensor in after.items())
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in after.items()) > len(after) / 3
    assert open_checkpoint(out).read("model.norm.weight").shape == after["model.language_model.norm.weight"].shape
    assert not out.with_name(f"{out.name}.work").exists()
    assert export([str(out), str(tmp_path / "bundle")]) == 0
    assert verify([str(tmp_path / "bundle"), "--against", str(out)]) == 0


def test_fine_tuning_is_what_it_is_without_zero3(folder: Path, python: Path, whole: Whole, tmp_path: Path) -> None:
    check_whole(folder / "start", whole("sft"), tmp_path)
    launch(python, *sft(folder, "plain"), launcher=("torch.distributed.run", "--standalone"))
    difference(whole("sft"), folder / "plain")


def test_distillation(folder: Path, whole: Whole, tmp_path: Path) -> None:
    out = whole("distillation")
    assert json.loads((out / "training.json").read_text())["kl_weight"] == 1
    check_whole(folder / "student", out, tmp_path)


def test_grpo(whole: Whole, tmp_path: Path) -> None:
    out = whole("grpo")
    assert any(entry["reward_std"] > 0 for entry in json.loads((out / "training.json").read_text())["log"])
    check_whole(ROOT / "checkpoints" / "tabletop", out, tmp_path)


def test_adapters_are_merged(folder: Path, python: Path) -> None:
    launch(python, *sft(folder, "lora"), "--lora-rank", 4)
    launch(python, *sft(folder, "plain-lora"), "--lora-rank", 4, launcher=("torch.distributed.run", "--standalone"))
    difference(folder / "lora", folder / "plain-lora")
    before, after = weights(folder / "start"), weights(folder / "lora")
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in after.items()) == 3 * 7


def kill(out: Path) -> None:
    """`kill -9` of all that works on a folder."""
    for process in psutil.process_iter(["cmdline"]):
        if str(out) in (process.info["cmdline"] or []):
            process.kill()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_it_goes_on_and_ends_alike(folder: Path, python: Path, whole: Whole, stage: str) -> None:
    out = folder / f"{stage}-killed"
    run = STAGES[stage](folder, out.name)
    process = start(python, *run)
    while not list(folder.glob(f"{out.name}.work/checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.01)
    kill(out)
    process.communicate()
    assert not out.exists()
    if stage == "sft":
        assert "--num-processes was 2, now not given" in alone(python, *run)
    launch(python, *run)
    mine, theirs = weights(out), weights(whole(stage))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def alone(python: Path, *arguments: object) -> str:
    """What the same says in one process, which cannot go on with two processes' work."""
    done = subprocess.run(
        list(map(str, (python, "-m", *arguments))), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    return done.stderr


def test_weights_that_were_not_gathered_are_refused(folder: Path, python: Path, whole: Whole) -> None:
    launcher = (*ACCELERATE, "false")
    said = launch(python, *sft(folder, "spread"), launcher=launcher, fails=True)
    assert "start again with accelerate's --zero3_save_16bit_model true" in said
    assert not (folder / "spread").exists()
    assert (folder / "spread.work" / "checkpoint-8" / "trainer_state.json").is_file()
    launch(python, *sft(folder, "spread"))
    difference(folder / "spread", whole("sft"))
