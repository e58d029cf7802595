"""Supervised fine-tuning end to end at tiny scale: it learns, resumes, and writes a checkpoint that opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration, TrainerCallback

from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import PromptTemplate
from tests.checkpoints import edit_json, edit_tensors
from tests.training import StopAt, weights
from train.checkpoint import read_settings
from train.data.record import write_records
from train.losses import answer_loss, spread
from train.rewrite import DENSE_HEAD
from train.sft import SftSettings, load_model, train
from train.small_model import write_small_model
from train.student import make_student
from train.world.dense_loss import DenseLoss
from train.world.records import world_records
from train.world.render import render


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SftSettings:
    folder = tmp_path_factory.mktemp("sft")
    write_small_model(folder / "start", seed=1)
    render(folder / "data", first_seed=0, scenes=4, size=128, processes=1)
    write_records(world_records(folder / "data", 8, cot_share=0.5, seed=0), folder / "records.jsonl")
    return SftSettings(
        model=folder / "start", data=folder / "data", out=folder / "out", steps=4, batch=2, questions=2, save_steps=2,
        warmup_steps=1, bf16=False, cot_share=0.5, dense_weight=0.3, muon=True,
    )  # fmt: skip


@pytest.mark.parametrize("data", ["data", "records.jsonl"])
def test_a_killed_run_ends_where_an_unbroken_one_does(run: SftSettings, data: str) -> None:
    """On scenes with the dense head and Muon; on records, grouped by length, with AdamW."""
    run = replace(run, data=run.data.with_name(data), out=run.out.with_name(f"whole-{data}"))
    if data == "records.jsonl":
        run = replace(run, dense_weight=0.0, muon=False, schedule="cosine")
    train(run)
    unbroken = weights(run.out)
    assert any(not torch.equal(unbroken[name], start) for name, start in weights(run.model).items())
    assert json.loads((run.out / "training.json").read_text())["steps"] == 4
    start, trained = (json.loads((folder / "config.json").read_text()) for folder in (run.model, run.out))
    assert trained.get("use_cache") == start.get("use_cache"), "Trainer's own, not the result's"
    with Image.open(run.out / "curves.png") as curves:
        assert curves.width > 300

    broken = replace(run, out=run.out.with_name(f"broken-{data}"))
    with pytest.raises(KeyboardInterrupt):
        train(broken, callbacks=[StopAt(3)])
    assert not broken.out.exists()
    with pytest.raises(GemvgError, match="other settings"):
        train(replace(broken, learning_rate=1.0))
    train(broken)
    for name, tensor in weights(broken.out).items():
        torch.testing.assert_close(tensor, unbroken[name], atol=1e-5, rtol=1e-4, msg=name)


def with_head(run: SftSettings) -> Any:
    """The model that a run starts from, with its dense head."""
    model = load_model(run)
    DenseLoss(model, run.model, read_settings(run.model))
    return model


def test_the_next_stage_goes_on_with_the_dense_head(run: SftSettings) -> None:
    first = replace(run, out=run.out.with_name("first"), steps=2)
    train(first)
    again = replace(run, model=first.out, out=run.out.with_name("again"), seed=7)
    left = load_file(first.out / DENSE_HEAD)
    taken = with_head(again).dense_head.state_dict()
    assert left.keys() == taken.keys()
    assert all(torch.equal(left[name], tensor) for name, tensor in taken.items())
    assert not any("dense" in name for name in load_file(first.out / "model.safetensors"))

    make_student(first.out, run.out.with_name("cut"), 4, None, None)
    assert (run.out.with_name("cut") / DENSE_HEAD).read_bytes() == (first.out / DENSE_HEAD).read_bytes()
    save_file({**left, "fates.bias": torch.zeros(9)}, first.out / DENSE_HEAD)
    with pytest.raises(GemvgError, match=r"dense_head.safetensors is no dense head for this model .*fates.bias"):
        with_head(again)


def test_lora_trains_adapters_and_writes_a_plain_checkpoint(run: SftSettings) -> None:
    adapted = replace(run, out=run.out.with_name("lora"), dense_weight=0.0, muon=False, lora_rank=4, steps=2)
    train(adapted)
    before, after = weights(run.model), weights(adapted.out)
    assert before.keys() == after.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("_proj" in name and "language_model" in name for name in changed), changed


def test_the_head_sees_the_answers_alone_and_the_loss_is_that_of_whole_rows(
    run: SftSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    forward = Qwen2VLForConditionalGeneration.forward

    def whole(self: Any, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)  # the logits of every place, of which the same are taken
        seen.append(tuple(output.logits.shape))
        output.logits = output.logits[:, logits_to_keep]
        return output

    short = replace(run, dense_weight=0.0, steps=1, lora_rank=2)
    train(replace(short, out=run.out.with_name("kept")))
    with monkeypatch.context() as patch:
        patch.setattr(Qwen2VLForConditionalGeneration, "forward", whole)
        train(replace(short, out=run.out.with_name("whole")))
    kept, rows = (weights(run.out.with_name(name)) for name in ("kept", "whole"))
    assert seen[0][1] > 50
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, rows[name], atol=1e-6, rtol=1e-5, msg=name)


def test_attention_by_plain_products_trains_the_same(run: SftSettings) -> None:
    fused = replace(run, out=run.out.with_name("fused"), dense_weight=0.0, steps=1)
    plain = replace(fused, out=run.out.with_name("plain"), attention="math")
    for one in (fused, plain):
        train(one)
    after = weights(plain.out)
    for name, tensor in weights(fused.out).items():
        torch.testing.assert_close(after[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    assert json.loads((plain.out / "training.json").read_text())["attention"] == "math"


def test_a_frozen_vision_tower_stays(run: SftSettings) -> None:
    frozen = replace(run, out=run.out.with_name("frozen"), dense_weight=0.0, freeze_vision=True, steps=2)
    train(frozen)
    before, after = weights(run.model), weights(frozen.out)
    assert {"visual" in name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == {False}


def test_the_tower_alone_leaves_the_decoder_as_it_is(run: SftSettings) -> None:
    """And what it learned is what the next stage starts from, its part of the dense head too."""
    alone = replace(run, out=run.out.with_name("tower"), tower_only=True, cot_share=0.0, questions=1, steps=3)
    train(alone)
    before, after = weights(run.model), weights(alone.out)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("visual" in name for name in changed), changed
    log = json.loads((alone.out / "training.json").read_text())["log"]
    assert {"tower_loss", "train_loss"} >= {name for name in log[0] if name.endswith("_loss")}
    head = load_file(alone.out / DENSE_HEAD)
    fresh = with_head(run).dense_head.state_dict()
    learned = {name for name, tensor in head.items() if not torch.equal(tensor, fresh[name])}
    assert learned == {"tower.weight", "tower.bias"}
    train(replace(run, model=alone.out, out=run.out.with_name("after-tower"), steps=1))


class KeepLosses(TrainerCallback):  # type: ignore[misc]
    """Remembers the loss that the Trainer reports."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, *args: object, logs: dict[str, float], **kwargs: object) -> None:
        """The Trainer calls it with each log."""
        self.losses += [logs["train_loss"]] if "train_loss" in logs else []


def test_accumulated_batches_do_not_add_up_their_losses(run: SftSettings) -> None:
    losses = []
    for batch, accumulate in ((2, 1), (1, 2)):
        out, kept = run.out.with_name(f"accumulate-{accumulate}"), KeepLosses()
        settings = replace(run, out=out, dense_weight=0.0, batch=batch, accumulate=accumulate, steps=1)
        train(settings, callbacks=[kept])
        losses += kept.losses
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # the same samples, weighed by question or by batch


def spoilt(run: SftSettings) -> Path:
    """The same model with one weight that is no number."""
    folder = run.model.with_name("spoilt")
    if not folder.exists():
        shutil.copytree(run.model, folder)
        edit_tensors(folder, lambda tensors: tensors["model.norm.weight"][3].fill_(torch.nan))
    return folder


BAD: list[tuple[Callable[[SftSettings], SftSettings], str]] = [
    (lambda run: replace(run, steps=0), "--steps must be at least 1, not 0"),
    (lambda run: replace(run, cot_share=2.0), "--cot-share must be between 0 and 1"),
    (
        lambda run: replace(run, schedule="linear"),  # type: ignore[arg-type]
        "--schedule must be one of wsd, cosine, not linear",
    ),
    (lambda run: replace(run, lora_rank=4), "--dense-weight needs rendered scenes"),
    (lambda run: replace(run, dense_weight=0.0, tower_only=True), "--tower-only needs --dense-weight"),
    (lambda run: replace(run, freeze_vision=True, tower_only=True), "a tower that is not frozen and one process"),
    (lambda run: replace(run, one_picture=True), "--one-picture needs rendered scenes as --data and no --cot-share"),
    (lambda run: replace(run, load_in_4bit=True), "--load-in-4bit needs --lora-rank"),
    (
        lambda run: replace(run, load_in_4bit=True, lora_rank=4, dense_weight=0.0),
        "--load-in-4bit needs a CUDA GPU and `pip install bitsandbytes`; leave it out, with --dtype bfloat16",
    ),
    (lambda run: replace(run, attention="flash_attention_2"), "--attention flash_attention_2 needs a GPU"),
    (
        lambda run: replace(run, dtype="float16"),  # type: ignore[arg-type]
        "--dtype must be one of float32, bfloat16, not float16",
    ),
    (lambda run: replace(run, max_length=0), "--max-length must be at least 1, not 0"),
    (lambda run: replace(run, max_pixels=3), "max_pixels=3; give a whole number of pixels"),
    (lambda run: replace(run, model=run.data), "data is not a checkpoint in the Hugging Face"),
    (lambda run: replace(run, data=run.model), "start has no scenes"),
    (lambda run: replace(run, data=run.data / "none.jsonl", dense_weight=0.0), "none.jsonl: no such file"),
    (lambda run: replace(run, out=run.data / "settings.json"), "settings.json is a file"),
    (lambda run: replace(run, out=run.model / "out"), "out lies in .*start, which is read; give a place beside it"),
    (lambda run: replace(run, model=spoilt(run)), "norm.weight holds NaN or infinity; go back to a good checkpoint"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_told(run: SftSettings, change: Callable[[SftSettings], SftSettings], message: str) -> None:
    with pytest.raises(GemvgError, match=message):
        train(change(run))
    assert not run.out.with_name(f"{change(run).out.name}.work").exists()


def test_location_targets_reward_near_misses() -> None:
    logits = torch.full((1, 20), -10.0)
    losses = []
    for said in (5, 6, 9):  # the target is location 5, at vocabulary index 8
        logits.fill_(-10)
        logits[0, 3 + said] = 10
        losses.append(answer_loss(logits, torch.tensor([8]), torch.ones(1), first_location=3, locations=12).item())
    assert losses[0] < losses[1] < losses[2]


def test_text_targets_are_plain_cross_entropy() -> None:
    logits, targets = torch.randn(6, 20), torch.tensor([0, 1, 2, 15, 16, 19])
    plain = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(answer_loss(logits, targets, torch.ones(6), first_location=3, locations=12), plain)


def test_spread_is_a_distribution_around_the_centre() -> None:
    soft = spread(torch.tensor([0.0, 4.5, 9.0]), 10)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(3))
    assert soft[[0, 2]].argmax(dim=1).tolist() == [0, 9]
    assert soft[1, 4] == soft[1, 5]


@pytest.mark.parametrize("grounding", [None, {"prompt": {"number_images": True}, "familiar": {"pictures": 2}}])
def test_what_was_trained_says_how_it_is_asked(run: SftSettings, grounding: dict[str, Any] | None) -> None:
    """A fine-tune of Qwen's would be exported as Qwen's own; one on other pictures no longer knows the old ones."""
    name = "of-ours" if grounding else "of-qwen"
    start = shutil.copytree(run.model, run.model.with_name(f"start-{name}"))
    edit_json(start / "config.json", grounding=grounding)
    train(replace(run, model=start, out=run.out.with_name(name), steps=1, dense_weight=0.0))
    settings = read_settings(run.out.with_name(name))
    assert settings.profile == "own"
    assert settings.template == PromptTemplate(number_images=bool(grounding))
    assert settings.answer_format.unnamed == "refuse"
    assert not settings.familiar.pictures
