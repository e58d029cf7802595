"""What a model sees while it is quantised: grounding prompts with their pictures and answers, or plain text.

A prompt is rendered as inference and training render it. Its tokens are of three classes (visual, text, answer), whose
weights say how much each counts in a Hessian: visual tokens are many and alike, the answer's are few and are the boxes
(VLMQ, arXiv 2508.03351, and MBQ, 2412.19509, weigh by gradient; ours are given). Knows neither layers nor solvers.
"""

from __future__ import annotations

import os
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable, reason
from gemvg_edge.marks import localise
from gemvg_edge.positions import text_positions
from gemvg_edge.prompt import IMAGE_TOKEN, encode
from train.checkpoint import CheckpointSettings
from train.collate import IGNORED, collate
from train.data.record import Fault, Record, check, read_records
from train.data.samples import record_sample
from train.data.sizes import picture_fault
from train.world.records import world_records
from train.world.render import render

SCENES_SEED = 900_000  # scenes of no other split
SCENES, SIZE = 100, 144
TEXT_TOKENS = 256  # of a piece of text, about a prompt's length
COT_SHARE = 0.5
MOST_DRAWN = 10  # questions for each that is asked


@dataclass(frozen=True)
class TokenWeights:
    """How much a token of each class counts in a Hessian."""

    visual: float = 1.0
    text: float = 1.0
    answer: float = 1.0


ALIKE = TokenWeights()


@dataclass(frozen=True)
class CalibrationPrompt:
    """One prompt with its answer."""

    ids: torch.Tensor  # (tokens)
    positions: torch.Tensor  # (3, tokens): mRoPE positions
    patches: torch.Tensor  # (patches, patch_dim), none for text
    grids: tuple[tuple[int, int, int], ...]
    weights: torch.Tensor  # (tokens)


def grounding_prompts(
    settings: CheckpointSettings, file: Path | None, scenes: Path, samples: int, weights: TokenWeights = ALIKE
) -> list[CalibrationPrompt]:
    """The records of a file, or without one of simulated scenes, as prompts.

    Scenes are rendered into `scenes` if they are not there. GemvgError names the record whose picture is missing.
    """
    records = _file_records(file, samples) if file else _simulated_records(settings, scenes, samples)
    prompts = []
    for number, record in enumerate(tqdm(records, desc="calibration prompts", unit="prompt", leave=False), 1):
        try:
            sample = record_sample(record, settings.answer_format, settings.resized(record.sizes))
            batch = collate([sample], settings, pad_id=0)
        except GemvgError as error:
            raise GemvgError(f"{file or scenes}, record {number}: {error}") from None
        ids = batch["input_ids"][0]
        weight = torch.full(ids.shape, weights.text)
        weight[ids == settings.image_token_id] = weights.visual
        weight[batch["labels"][0] != IGNORED] = weights.answer
        grids = tuple((int(t), int(h), int(w)) for t, h, w in batch["image_grid_thw"])
        prompts.append(CalibrationPrompt(ids, batch["position_ids"][:, 0], batch["pixel_values"], grids, weight))
    return prompts


def text_prompts(settings: CheckpointSettings, text: str, samples: int) -> list[CalibrationPrompt]:
    """Consecutive pieces of a text, as language models are calibrated."""
    prompts = []
    for piece in islice(_pieces(settings, text), samples):
        if settings.image_token_id in piece:
            raise GemvgError(f"the text holds {IMAGE_TOKEN}, where the model would look for a picture; take it out")
        positions = torch.from_numpy(text_positions(0, len(piece)))
        prompts.append(CalibrationPrompt(piece, positions, torch.empty(0, 0), (), torch.ones(len(piece))))
    if not prompts:
        raise GemvgError(f"the text is shorter than {TEXT_TOKENS} tokens; give a longer one")
    return prompts


def read_text(file: Path | None) -> str:
    """A text file, or Python's own language reference: 700 kB of English that every Python carries."""
    if file is None:
        return "\n\n".join(pydoc_data.topics.topics.values())
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise GemvgError(f"{printable(file)} cannot be read as text ({reason(error)}); give a UTF-8 file") from None


def _file_records(file: Path, samples: int) -> list[Record]:
    """The first records of a file; one that is broken is an error, since few are read and all count."""
    records = []
    for number, record in enumerate(islice(read_records(file), samples), 1):
        fault = record.reason if isinstance(record, Fault) else check(record)
        if isinstance(record, Record) and not fault and (found := picture_fault(record)):
            fault = f"{found.where}: {found.reason}"
        if fault or isinstance(record, Fault):
            raise GemvgError(f"{file}, record {number}: {fault}; mend it or leave it out")
        records.append(record)
    if not records:
        raise GemvgError(f"{file} has no records; write it with train.data.convert or train.world.records")
    return records


def _simulated_records(settings: CheckpointSettings, folder: Path, samples: int) -> list[Record]:
    """Questions about scenes of the simulated world that are in no other split; they are rendered the first time."""
    render(folder, SCENES_SEED, SCENES, SIZE, os.cpu_count() or 1)
    drawn = world_records(folder, MOST_DRAWN * samples, COT_SHARE, seed=0)
    return list(islice((record for record in drawn if _can_be_asked(settings, record)), samples))


def _can_be_asked(settings: CheckpointSettings, record: Record) -> bool:
    """Whether a model can read the boxes of a question and of its reasoning: in pixels it is not always clear."""
    try:
        for text in (record.query, record.thinking if record.mode == "cot" else ""):
            localise(text, settings.answer_format, settings.resized(record.sizes))
    except GemvgError:
        return False
    return True


def _pieces(settings: CheckpointSettings, text: str) -> Iterator[torch.Tensor]:
    length = 8 * TEXT_TOKENS  # characters; whole words of any language are longer than an eighth of a token
    left: list[int] = []
    for start in range(0, len(text), length):
        left += encode(settings.tokenizer, text[start : start + length])
        while len(left) >= TEXT_TOKENS:
            yield torch.tensor(left[:TEXT_TOKENS])
            left = left[TEXT_TOKENS:]
