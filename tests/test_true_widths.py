"""One layer of the 7B and one vision block at their true widths, through every training stage and in ONNX Runtime.

And Qwen3-VL's, which is not trained here, in ONNX Runtime.

In one file, and so one after the other in one process: each takes nearly 4 GB, and a laptop has 8.
"""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import Qwen2VLForConditionalGeneration

from export.bundle_writer import Recipe, write_bundle
from export.verify import verify
from export.weights import Scheme
from gemvg_edge.boxes import Box
from gemvg_edge.bundle import open_bundle
from quantize.checkpoint import open_checkpoint
from tests.checkpoints import (
    ONE_7B_LAYER,
    PREPROCESSING_3,
    TRUE_3_2B_WIDTHS,
    TRUE_3_8B_WIDTHS,
    torch_logits,
    torch_vision,
    write_checkpoint,
    write_json,
)
from tests.test_engine import SCENES, TOLERANCE, Case, difference, export_and_open
from tests.test_grpo import group_scores
from train import distill, grpo, sft
from train.data.record import Mode, Record, write_records
from train.student import make_student
from train.trainer import GroundingTrainer

INT4, INT8 = Scheme(4), Scheme(8)

pytestmark = [
    pytest.mark.slow,
    # TRL 1.16 still asks transformers 5.23 under the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The random layer in `checkpoint`, and `records.jsonl`; its gigabytes are not left to pytest's keeping."""
    folder = tmp_path_factory.mktemp("wide")
    write_checkpoint(folder / "checkpoint", ONE_7B_LAYER, bfloat16=True)
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "checkpoint" / "tokenizer_config.json", tokens)
    records = []
    for number in range(4):
        files = [folder / f"{number}-{letter}.png" for letter in "ab"]
        for file in files:
            Image.new("RGB", (84, 56), (60 * number, 90, 120)).save(file)
        boxes = (Box(1, 10, 10, 40, 50),)
        mode: Mode = "cot" if number % 2 else "direct"
        records.append(Record(tuple(files), ((84, 56),) * 2, "the mug", boxes, "spatial", "test", mode, "a mug"))
    write_records(records, folder / "records.jsonl")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def out(folder: Path) -> Iterator[Path]:
    """Where a stage writes."""
    yield folder / "out"
    shutil.rmtree(folder / "out")


@pytest.fixture(autouse=True)
def rubbish() -> Iterator[None]:
    """A trainer and its model, which refer to each other, are not left to the next test, nor to the allocator."""
    give_back()
    yield
    give_back()


def give_back() -> None:
    gc.collect()
    if sys.platform == "linux":  # glibc keeps what was freed between two things that are not
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def changes(before: Path, after: Path) -> Iterator[tuple[str, float]]:
    """Each weight's name and how far its furthest number moved."""
    give_back()
    files = (folder / "model.safetensors" for folder in (before, after))
    old, new = (safe_open(file, "pt") for file in files)
    with old, new:
        assert set(old.keys()) == set(new.keys())
        for name in old.keys():  # noqa: SIM118  # no mapping
            yield name, (new.get_tensor(name).float() - old.get_tensor(name).float()).abs().max().item()


def test_grpo_takes_two_steps(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of the decoder through the 7B's own entry point.

    Adafactor and no reference model keep it small; AdamW and the KL term would take twice that.
    """
    monkeypatch.setattr(grpo, "score", group_scores([[0.0, 1.0], [0.0, 1.0]]))
    run = grpo.GrpoSettings(
        folder / "checkpoint", folder / "records.jsonl", out, steps=2, batch=1, generations=2, device_batch=2,
        max_new_tokens=3, learning_rate=1e-4, save_steps=9, beta=0.0, optimizer="adafactor", bf16=False,
        # Hot: two equal answers, given unequal rewards, would pull the same weights both ways and move nothing.
        temperature=20.0,
    )  # fmt: skip
    grpo.train(run)
    log = json.loads((out / "training.json").read_text())["log"][:2]
    assert [entry["groups/dropped"] for entry in log] == [0, 0]
    assert all(0 < entry["grad_norm"] < 1e4 for entry in log)
    moved = dict(changes(run.model, out))
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.bias"):
        assert 0 < moved[name] < 0.1


class FrugalTrainer(GroundingTrainer):
    """Two of the MLP's three matrices, for which AdamW would take 1.6 GB, stay; its state ends with the last step."""

    def __init__(self, *, model: Any, **kwargs: Any):
        for layer in model.model.language_model.layers:
            layer.mlp.gate_proj.requires_grad_(False)
            layer.mlp.up_proj.requires_grad_(False)
        super().__init__(model=model, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer does, once the steps are done."""
        assert self.optimizer is not None
        self.optimizer.state.clear()
        super().save_model(*args, **kwargs)


def test_fine_tuning_takes_two_steps(folder: Path, out: Path) -> None:
    """The recipe of the first stage: AdamW, cosine, frozen vision tower, activations computed again."""
    run = sft.SftSettings(
        folder / "checkpoint", folder / "records.jsonl", out, steps=2, batch=1, accumulate=2, learning_rate=5e-6,
        schedule="cosine", weight_decay=0.0, warmup_steps=1, freeze_vision=True, checkpointing=True, save_steps=10,
        bf16=False,
    )  # fmt: skip
    sft.train(run, FrugalTrainer)
    changed = {name for name, moved in changes(run.model, out) if moved > 0}
    assert any("layers.0.mlp.down_proj" in name for name in changed)
    assert not any("visual" in name for name in changed)


def test_distillation_takes_two_steps(folder: Path, out: Path) -> None:
    """The recipe's own commands: a student made of the teacher, then distilled."""
    student = folder / "student"
    make_student(folder / "checkpoint", student, 1, 1, 18944 // 32)
    run = distill.DistillSettings(
        teacher=folder / "checkpoint", model=student, data=folder / "records.jsonl", out=out, steps=2, batch=1,
        warmup_steps=1, bf16=True, learning_rate=1e-5,
    )  # fmt: skip
    distill.train(run)
    assert dict(changes(student, out))["lm_head.weight"] > 0


def test_a_bundle_is_transformers(folder: Path) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=torch.float32)
    cases = [Case.random(grids) for grids in SCENES.values()]
    visual = [torch_vision(model, case.patches, case.grids) for case in cases]
    expected = [torch_logits(model, case.ids, case.patches, case.grids)[np.array(case.cuts[1:]) - 1] for case in cases]
    del model  # or two copies of the weights would be in memory
    engine = export_and_open(folder, Recipe())
    for case, features, logits in zip(cases, visual, expected, strict=True):
        for ours, theirs in zip(engine.vision.encode(case.patches, case.grids), features, strict=True):
            assert difference(ours, theirs) <= TOLERANCE
        assert difference(engine.logits(case, case.cuts), logits) <= TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "dialects"), [(TRUE_3_2B_WIDTHS, ("fused",)), (TRUE_3_8B_WIDTHS, ("standard", "plain"))], ids=["2B", "8B"]
)
def test_a_qwen3_bundle_is_transformers(sizes: dict[str, Any], dialects: Sequence[str], tmp_path: Path) -> None:
    """The 2B in one dialect, the 8B in the others and rounded: heads of 72, and 4304 inputs are no whole blocks."""
    try:
        model = write_checkpoint(tmp_path / "checkpoint", sizes, bfloat16=True)
        cases = [Case.random(grids, 0, PREPROCESSING_3) for grids in SCENES.values()]
        visual = [torch_vision(model, case.patches, case.grids) for case in cases]
        expected = [
            torch_logits(model, case.ids, case.patches, case.grids)[np.array(case.cuts[1:]) - 1] for case in cases
        ]
        del model
        for dialect in dialects:
            give_back()
            engine = export_and_open(tmp_path, Recipe(dialect))
            for case, features, logits in zip(cases, visual, expected, strict=True):
                for ours, theirs in zip(engine.vision.encode(case.patches, case.grids), features, strict=True):
                    assert difference(ours, theirs) <= TOLERANCE
                assert difference(engine.logits(case, case.cuts), logits) <= TOLERANCE
            del engine
            shutil.rmtree(tmp_path / "bundle")
        if sizes is TRUE_3_8B_WIDTHS:
            give_back()
            rounded = Recipe(decoder=INT4, vision=INT8)
            write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", rounded)
            assert verify(open_bundle(tmp_path / "bundle"), tmp_path / "checkpoint")["passed"]
    finally:
        shutil.rmtree(tmp_path)
