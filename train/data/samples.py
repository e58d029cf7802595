"""Records -> training samples: pictures opened when needed, answers written in the checkpoint's format."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemvg_edge.answer import AnswerFormat, write_answer
from gemvg_edge.boxes import Size
from gemvg_edge.errors import GemvgError
from gemvg_edge.marks import localise
from train.checkpoint import CheckpointSettings
from train.collate import Sample, Turn
from train.data.record import Record, Tally, keep_good, read_records
from train.data.sizes import keep_measured, open_pictures

STRETCH = 50  # batches that are sorted by length together
CHARACTERS_A_TOKEN = 4  # of English text, roughly; lengths only decide which records share a batch


def read_all(file: Path) -> list[Record]:
    """Every good record of a file with its pictures; the others are told on stderr. An empty file is an error."""
    tally = Tally()
    items = tqdm(keep_measured(read_records(file)), desc=f"reading {file.name}", unit=" records", delay=3, leave=False)
    records = list(keep_good(items, tally))
    print(f"{file}:", *tally.lines(), sep="\n  ", file=sys.stderr)
    if not records:
        raise GemvgError(f"{file} has no record that can be used; see the counts above")
    return records


def record_turn(record: Record, answer_format: AnswerFormat, resized: Sequence[Size] | None = None) -> Turn:
    """The record's question, and its answer as the model has to write it; answers in pixels need `resized` sizes."""
    if record.kind == "understanding":
        return Turn(record.query, record.words)
    thinking = localise(record.thinking, answer_format, resized) if record.mode == "cot" else None
    answer = write_answer(record.boxes, record.sizes, answer_format, thinking, resized)
    return Turn(record.query, answer, thinking is not None)


def record_sample(record: Record, answer_format: AnswerFormat, resized: Sequence[Size] | None = None) -> Sample:
    """One record with its pictures opened; EXIF turns are undone, as the runtime does."""
    return Sample(open_pictures(record), [record_turn(record, answer_format, resized)])


def grouped_order(lengths: Sequence[int], batch: int, draws: int, seed: int) -> list[int]:
    """Which record each of `draws` draws takes: every pass is shuffled, and batches hold records of about one length.

    As transformers' LengthGroupedSampler does it (sorted within stretches of many batches, the batches shuffled), but
    fixed by the seed alone, so that a resumed run goes on with the same draws.
    """
    stretch, order = batch * STRETCH, list[int]()
    while len(order) < draws:
        rng = np.random.default_rng([seed, len(order)])
        shuffled = [int(k) for k in rng.permutation(len(lengths))]
        batches = []
        for start in range(0, len(shuffled), stretch):
            alike = sorted(shuffled[start : start + stretch], key=lambda k: -lengths[k])
            batches += [alike[first : first + batch] for first in range(0, len(alike), batch)]
        whole = [group for group in batches if len(group) == batch]
        rest = [group for group in batches if len(group) < batch]  # last, or all later batches would straddle two
        order += [k for n in rng.permutation(len(whole)) for k in whole[n]] + [k for group in rest for k in group]
    return order[:draws]


def record_lengths(records: Sequence[Record], settings: CheckpointSettings) -> list[int]:
    """About how many tokens each record takes."""
    numbers = settings.preprocessing
    side = numbers.patch_size * numbers.merge_size
    lengths = []
    for record in records:
        resized = settings.resized(record.sizes)
        visual = sum(width * height // side**2 for width, height in resized)
        words = len(record.query) + len(record_turn(record, settings.answer_format, resized).answer)
        lengths.append(visual + words // CHARACTERS_A_TOKEN)
    return lengths
