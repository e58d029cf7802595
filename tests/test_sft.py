"""Supervised fine-tuning end to end at tiny scale: it learns, resumes, and writes a checkpoint that opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration, TrainerCallback, TrainerState

from gemvg_edge.errors import GemvgError
from train import sft
from train.dense_head import spread
from train.sft import SftSettings, answer_loss, train
from train.small_model import write_small_model
from train.tabletop import render


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SftSettings:
    folder = tmp_path_factory.mktemp("sft")
    write_small_model(folder / "start", seed=1)
    render(folder / "data", first_seed=0, scenes=4, cameras=3, size=128, processes=1)
    return SftSettings(
        model=folder / "start", data=folder / "data", out=folder / "out", steps=4, batch=2, questions=2, save_steps=2,
        warmup_steps=1, bf16=False, curriculum_share=0.5,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict()
    return state


class StopAt(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """Stands for a kill: raises after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """The Trainer calls it after each step."""
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_killed_run_ends_where_an_unbroken_one_does(run: SftSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    train(run)
    unbroken = weights(run.out)
    assert any(not torch.equal(unbroken[name], start) for name, start in weights(run.model).items())
    assert json.loads((run.out / "training.json").read_text())["steps"] == 4

    broken = replace(run, out=run.out.with_name("broken"))
    trainer = sft.GroundingTrainer
    with monkeypatch.context() as patch:
        patch.setattr(sft, "GroundingTrainer", lambda **kwargs: trainer(callbacks=[StopAt(3)], **kwargs))
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert not broken.out.exists()
    with pytest.raises(GemvgError, match="other settings"):
        train(replace(broken, learning_rate=1.0))
    train(broken)
    for name, tensor in weights(broken.out).items():
        torch.testing.assert_close(tensor, unbroken[name], atol=1e-5, rtol=1e-4, msg=name)


def test_location_targets_reward_near_misses() -> None:
    logits = torch.full((1, 20), -10.0)
    losses = []
    for said in (5, 6, 9):  # the target is location 5, at vocabulary index 8
        logits.fill_(-10)
        logits[0, 3 + said] = 10
        losses.append(answer_loss(logits, torch.tensor([8]), first_location=3, locations=12).item())
    assert losses[0] < losses[1] < losses[2]


def test_text_targets_are_plain_cross_entropy() -> None:
    logits, targets = torch.randn(6, 20), torch.tensor([0, 1, 2, 15, 16, 19])
    plain = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(answer_loss(logits, targets, first_location=3, locations=12), plain)


def test_spread_is_a_distribution_around_the_centre() -> None:
    soft = spread(torch.tensor([0.0, 4.5, 9.0]), 10)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(3))
    assert soft[[0, 2]].argmax(dim=1).tolist() == [0, 9]
    assert soft[1, 4] == soft[1, 5]


def test_a_run_without_the_dense_head(run: SftSettings) -> None:
    plain = replace(run, out=run.out.with_name("plain"), dense_weight=0.0, steps=2)
    train(plain)
    before, after = weights(plain.model), weights(plain.out)
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[name], start) for name, start in before.items())
