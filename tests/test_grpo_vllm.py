"""GRPO's answers by vLLM, which is not installed here: TRL's own path, with vLLM's engine alone replaced.

The engine takes ids and pictures as vLLM does: one image token a picture, which it expands by its own processor.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.generation import vllm_generation

from gemvg_edge.images import patchify, resize
from tests.test_grpo import by_letters, one_batch, run, trainer_of  # noqa: F401  (a fixture among them)
from train import grpo
from train.checkpoint import read_settings
from train.grpo import GrpoSettings
from train.grpo_trainer import one_token_a_picture

IMAGE = 7
END = 3  # of a picture, which always follows its tokens
WORDS = st.lists(st.integers(0, 6), max_size=4)


@given(WORDS, st.lists(st.tuples(st.integers(1, 9), WORDS), max_size=4))
def test_each_picture_is_one_token(start: list[int], pictures: list[tuple[int, list[int]]]) -> None:
    long, short = list(start), list(start)
    for count, words in pictures:
        long += [IMAGE] * count + [END, *words]
        short += [IMAGE, END, *words]
    assert one_token_a_picture(long, IMAGE) == short
    assert one_token_a_picture(short, IMAGE) == short


class Engine:
    """Stands for vllm.LLM: keeps the prompts as it expands them and the weights that it is given."""

    last: Engine

    def __init__(self, model: str, **options: Any) -> None:
        Engine.last = self
        self.settings, self.options = read_settings(Path(model)), options
        self.prompts: list[list[int]] = []
        self.weights: dict[str, torch.Tensor] = {}
        loader = SimpleNamespace(load_weights=self.weights.update)
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=loader))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def reset_prefix_cache(self) -> None:
        """After new weights."""

    def expand(self, ids: list[int], pictures: list[Any]) -> list[int]:
        """As vLLM does it: the k-th image token becomes as many as picture k has merged patches."""
        numbers, grids = self.settings.preprocessing, []
        for picture in pictures:
            _, (t, h, w) = patchify(resize(picture, numbers), numbers)
            grids.append(t * h * w // numbers.merge_size**2)
        assert ids.count(self.settings.image_token_id) == len(grids), "not one image token a picture"
        left = iter(grids)
        return [
            token for known in ids for token in [known] * (next(left) if known == self.settings.image_token_id else 1)
        ]

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        """Answers of one to four tokens, each with its log probability."""
        answers = []
        for number, prompt in enumerate(prompts):
            pictures = prompt["multi_modal_data"]["image"]
            ids = self.expand(prompt["prompt_token_ids"], pictures if isinstance(pictures, list) else [pictures])
            self.prompts.append(ids)
            said = [40 + number + k for k in range(1 + number % 4)]
            logprobs = [{token: SimpleNamespace(rank=1, logprob=-2.0)} for token in said]
            output = SimpleNamespace(token_ids=said, logprobs=logprobs)
            answers.append(SimpleNamespace(prompt_token_ids=ids, outputs=[output]))
        return answers


def test_vllm_sees_the_prompt_that_is_learned_from(
    run: GrpoSettings,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpo, "score", by_letters)
    for name, stand_in in (("LLM", Engine), ("SamplingParams", SimpleNamespace)):
        monkeypatch.setattr(vllm_generation, name, stand_in, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    with patch.dict(os.environ):  # where TRL tells vLLM its rank
        trainer = trainer_of(replace(run, out=run.out.with_name("vllm"), vllm=True, seed=2))
        rows, output = one_batch(trainer)
    assert len({len(row["record"].images) for row in rows}) == 2
    kept = [ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)]
    assert Engine.last.prompts == kept
    answers = [ids[:2].tolist() for ids in output["completion_ids"]]
    assert answers[1] == [41, 42]
    assert Engine.last.weights.keys() == {name for name, _ in trainer.model.named_parameters()}
    assert output["importance_sampling_ratio"].isfinite().all()
    assert trainer._compute_loss(trainer.model, output).isfinite()
