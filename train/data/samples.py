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
from gemvg_edge.prompt import END_OF_TURN, encode, encode_prefix, encode_query
from train.checkpoint import CheckpointSettings
from train.collate import Sample, Turn
from train.data.record import Record, Tally, keep_good, read_records
from train.data.sizes import keep_measured, open_pictures

STRETCH = 50  # groups that are sorted by length together


def read_short(file: Path, settings: CheckpointSettings, most: int | None) -> tuple[list[Record], list[int]]:
    """The good records of a file and their lengths in tokens; those of more than `most` are left out and told."""
    records = read_all(file)
    lengths = record_lengths(records, settings)
    if most is None:
        return records, lengths
    kept = [(record, length) for record, length in zip(records, lengths, strict=True) if length <= most]
    if len(kept) < len(records):
        longest = f"{len(records) - len(kept)} of them left out: longer than {most} tokens, the longest {max(lengths)}"
        print(f"  {longest}", file=sys.stderr)
    if not kept:
        raise GemvgError(f"{file} has no record of at most {most} tokens; raise --max-length or lower --max-pixels")
    return [record for record, _ in kept], [length for _, length in kept]


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


def grouped_order(lengths: Sequence[int], group: int, draws: int, seed: int) -> list[int]:
    """Which record each of `draws` draws takes: every pass is shuffled, and groups hold records of about one length.

    A group is what all devices compute at once, which is as long as its longest takes. As transformers'
    LengthGroupedSampler does it (sorted within stretches of many groups, the groups shuffled), but fixed by the seed
    alone, so that a resumed run goes on with the same draws. What fills no group joins the next pass.
    """
    stretch, order, left, number = group * STRETCH, list[int](), list[int](), 0
    while len(order) < draws:
        rng = np.random.default_rng([seed, number])
        shuffled = left + [int(k) for k in rng.permutation(len(lengths))]
        number, groups, left = number + 1, [], []
        for start in range(0, len(shuffled), stretch):
            part = shuffled[start : start + stretch]
            whole = len(part) // group * group
            alike, left = sorted(part[:whole], key=lambda k: -lengths[k]), part[whole:]
            groups += [alike[first : first + group] for first in range(0, whole, group)]
        order += [k for n in rng.permutation(len(groups)) for k in groups[n]]
    return order[:draws]


def record_lengths(records: Sequence[Record], settings: CheckpointSettings) -> list[int]:
    """How many tokens each record's row has in a batch."""
    numbers, about = settings.preprocessing, (settings.tokenizer, settings.template)
    side = numbers.patch_size * numbers.merge_size
    one = (1, numbers.merge_size, numbers.merge_size)  # the patches of one visual token
    prefixes: dict[int, int] = {}  # pictures -> tokens around them
    lengths = []
    for record in records:
        resized, count = settings.resized(record.sizes), len(record.sizes)
        visual = sum(width * height // side**2 for width, height in resized)
        if count not in prefixes:
            prefixes[count] = len(encode_prefix(*about, [one] * count, numbers.merge_size)) - count
        query, answer, think = record_turn(record, settings.answer_format, resized)
        asked = encode_query(*about, settings.answer_format, query, think, resized)
        told = encode(settings.tokenizer, answer + END_OF_TURN)
        lengths.append(prefixes[count] + visual + len(asked) + len(told))
    return lengths
