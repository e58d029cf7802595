"""Samples -> batches: pictures, a shared prefix, and one branch a question.

A sample's pictures are a long prefix and its questions are short, so all questions of a sample share one row: every
branch (question and answer) sees the prefix and itself, and its positions start where the prefix ends. The loss is
exactly that of asking each question alone (tests/test_collate.py), at a fraction of the work. With one question a
sample this is the plain causal case. Uses the runtime's own prompt, positions and patches, so training sees what
inference will.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from gemvg_edge.images import patchify, resize
from gemvg_edge.positions import mrope_positions, text_positions
from gemvg_edge.prompt import END_OF_TURN, encode_prefix, encode_query
from train.checkpoint import CheckpointSettings

IGNORED = -100  # the label that a cross-entropy leaves out
LOSS_INPUTS = ("labels", "loss_weights")  # of a batch: what the loss takes, and the model does not


class Turn(NamedTuple):
    """A question and its answer's text; with `think` the answer reasons first and the question asks for that."""

    query: str
    answer: str
    think: bool = False


@dataclass(frozen=True)
class Sample:
    """Pictures with the questions about them."""

    images: Sequence[Image.Image]
    turns: Sequence[Turn]


@dataclass(frozen=True)
class _Row:
    ids: npt.NDArray[np.int64]  # (tokens,)
    labels: npt.NDArray[np.int64]  # (tokens,)
    weights: npt.NDArray[np.float32]  # (tokens,): how much each token counts in the loss
    positions: npt.NDArray[np.int64]  # (3, tokens)
    branch: npt.NDArray[np.int64]  # (tokens,): 0 for the prefix, then 1, 2, ... a question


def collate(
    samples: Sequence[Sample], settings: CheckpointSettings, pad_id: int, conclusion_weight: float = 1.0
) -> dict[str, Any]:
    """The model's inputs: `position_ids` is (3, batch, tokens), `attention_mask` as `seen_tokens` has it.

    LOSS_INPUTS are the loss's: `labels` and `loss_weights` (batch, tokens), which is `conclusion_weight` where an
    answer's reasoning concludes, else 1.
    """
    patches, grids, rows = [], [], []
    for sample in samples:
        pairs = [patchify(resize(image, settings.preprocessing), settings.preprocessing) for image in sample.images]
        patches += [pair[0] for pair in pairs]
        grids += [pair[1] for pair in pairs]
        rows.append(_row(sample, [pair[1] for pair in pairs], settings, conclusion_weight))
    length = max(len(row.ids) for row in rows)
    shape = (len(rows), length)
    ids = np.full(shape, pad_id)
    labels = np.full(shape, IGNORED)
    weights = np.ones(shape, np.float32)
    positions = np.zeros((3, *shape), np.int64)
    branch = np.full(shape, -1)
    for k, row in enumerate(rows):
        n = len(row.ids)
        ids[k, :n], labels[k, :n], positions[:, k, :n], branch[k, :n] = row.ids, row.labels, row.positions, row.branch
        weights[k, :n] = row.weights
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "loss_weights": torch.from_numpy(weights),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": torch.from_numpy(seen_tokens(branch)),
        "mm_token_type_ids": torch.from_numpy((ids == settings.image_token_id).astype(np.int64)),
        "pixel_values": torch.from_numpy(np.concatenate(patches)),
        "image_grid_thw": torch.tensor(grids),
    }


def seen_tokens(branch: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Branch numbers (batch, tokens) -> (batch, tokens), 1 where there is no padding, if no row has two questions.

    That is plain causal attention, which needs no mask of its own: at 5,200 tokens one took 77 ms a batch to make, and
    fast attention takes none. With several questions in a row it is `branch_mask`'s, (batch, 1, tokens, tokens).
    """
    return branch_mask(branch)[:, None] if branch.max() > 1 else (branch >= 0).astype(np.int64)


def branch_mask(branch: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Branch numbers (batch, tokens) -> which key each query may see, (batch, tokens, tokens).

    A token sees the prefix (0) and its own branch, up to itself; padding (-1) sees padding, so that no softmax is
    empty.
    """
    query, key = branch[:, :, None], branch[:, None, :]
    causal = np.tri(branch.shape[1], dtype=bool)
    seen: npt.NDArray[np.bool_] = ((query == key) | ((key == 0) & (query > 0))) & causal
    return seen


def conclusion(answer: str) -> tuple[int, int]:
    """From which character to which an answer's reasoning concludes: its last sentence. (0, 0) without reasoning."""
    reasoned = re.match(r"<think>(.*?)\s*</think>", answer, re.DOTALL)
    if not reasoned:
        return 0, 0
    before = re.search(r".*[.!?]\s+(?=\S)", reasoned[1], re.DOTALL)
    return reasoned.start(1) + (before.end() if before else 0), reasoned.end(1)


def _row(
    sample: Sample, grids: Sequence[tuple[int, int, int]], settings: CheckpointSettings, conclusion_weight: float
) -> _Row:
    merge = settings.preprocessing.merge_size
    prefix = encode_prefix(settings.tokenizer, settings.template, grids, merge)
    positions = mrope_positions(prefix, settings.image_token_id, grids, merge)
    start = int(positions.max()) + 1
    ids, labels, weights, places, branch = (
        [prefix],
        [np.full(len(prefix), IGNORED)],
        [np.ones(len(prefix), np.float32)],
        [positions],
        [np.zeros(len(prefix), np.int64)],
    )
    resized = settings.resized([image.size for image in sample.images])
    for number, (query, answer, think) in enumerate(sample.turns, start=1):
        question = encode_query(settings.tokenizer, settings.template, settings.answer_format, query, think, resized)
        encoded = settings.tokenizer.encode(answer + END_OF_TURN, add_special_tokens=False)
        target = np.asarray(encoded.ids, np.int64)
        first, last = conclusion(answer)
        concludes = [first < end <= last for _, end in encoded.offsets]
        tokens = np.concatenate([question, target])
        ids.append(tokens)
        labels.append(np.concatenate([np.full(len(question), IGNORED), target]))
        counts = np.where(concludes, conclusion_weight, 1)
        weights.append(np.concatenate([np.ones(len(question)), counts]).astype(np.float32))
        places.append(text_positions(start, len(tokens)))
        branch.append(np.full(len(tokens), number))
    flat = np.concatenate(ids), np.concatenate(labels), np.concatenate(weights)
    return _Row(*flat, np.concatenate(places, axis=1), np.concatenate(branch))
