"""Training batches: sharing a prefix among questions changes nothing; the labels are the answers and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from train.checkpoint import CheckpointSettings, read_settings
from train.collate import IGNORED, LOSS_INPUTS, Sample, Turn, branch_mask, collate
from train.small_model import write_small_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_small_model(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def settings(checkpoint: Path) -> CheckpointSettings:
    return read_settings(checkpoint)


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


TURNS = (
    Turn("the red mug", "None"),
    Turn("every bowl in image 2", "Image-2: <|box_start|><loc_1><loc_2><loc_30><loc_40><|box_end|>"),
    Turn("every bowl in image 2", "<think>one</think><answer>None</answer>", think=True),
)


def logits_of_answers(model: Qwen2VLForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        inputs = {name: tensor for name, tensor in batch.items() if name not in LOSS_INPUTS}
        logits: torch.Tensor = model(**inputs).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != IGNORED]


def test_questions_that_share_a_prefix_are_as_if_asked_alone(checkpoint: Path, settings: CheckpointSettings) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    images = [picture(0, 100, 80), picture(1, 64, 120)]
    together = logits_of_answers(model, collate([Sample(images, TURNS)], settings, pad_id=0))
    alone = [logits_of_answers(model, collate([Sample(images, [turn])], settings, pad_id=0)) for turn in TURNS]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=0)


def test_one_question_is_the_plain_causal_case_of_transformers(checkpoint: Path, settings: CheckpointSettings) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    batch = collate([Sample([picture(0, 100, 80)], TURNS[1:2])], settings, pad_id=0)
    ours = logits_of_answers(model, batch)
    plain = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
    plain["attention_mask"] = torch.ones_like(batch["input_ids"])
    torch.testing.assert_close(ours, logits_of_answers(model, plain), atol=2e-5, rtol=0)


def test_padding_changes_nothing(checkpoint: Path, settings: CheckpointSettings) -> None:
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    short, long = Sample([picture(0, 64, 64)], TURNS[:1]), Sample([picture(1, 128, 128), picture(2, 90, 90)], TURNS)
    padded = logits_of_answers(model, collate([short, long], settings, pad_id=0))
    apart = [logits_of_answers(model, collate([sample], settings, pad_id=0)) for sample in (short, long)]
    torch.testing.assert_close(padded, torch.cat(apart), atol=2e-5, rtol=0)


def test_labels_are_the_answers_with_their_end(settings: CheckpointSettings) -> None:
    labels = collate([Sample([picture(0, 64, 64)], TURNS)], settings, pad_id=0)["labels"][0]
    text = settings.tokenizer.decode(labels[labels != IGNORED].tolist(), skip_special_tokens=False)
    assert text == "".join(answer + "<|im_end|>" for _, answer, _ in TURNS)


def test_branch_mask_by_hand() -> None:
    seen = branch_mask(np.asarray([[0, 0, 1, 1, 2, -1]]))[0].astype(int)
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_one_question_a_row_needs_no_mask_of_its_own(checkpoint: Path, settings: CheckpointSettings) -> None:
    """Padded and not, against the mask that several questions need."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint).eval()
    rows = [Sample([picture(k, 64 + 60 * k, 64)], TURNS[k : k + 1]) for k in range(2)]
    batch = collate(rows, settings, pad_id=0)
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    dense = {**batch, "attention_mask": torch.from_numpy(branch_mask(batch["attention_mask"].numpy() - 1))[:, None]}
    torch.testing.assert_close(logits_of_answers(model, batch), logits_of_answers(model, dense), atol=2e-5, rtol=0)
