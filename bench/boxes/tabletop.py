"""The simulated world's questions, or records of one's own: F1 of boxes, and whether whole questions are right."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bench.boxes.answers import Answered, Benchmark, Question
from bench.boxes.asking import NEW_TOKENS, Model
from bench.boxes.held_out import HELD_OUT, SPLITS, held_out_named
from bench.boxes.rated import Rated
from bench.boxes.scoring import Counts, count, score_counts
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable
from gemvg_edge.images import load_image
from train.data.record import Record
from train.data.samples import read_all

QUESTIONS = 500
VALUES = ("exact", "image_accuracy")
# Groups of the questions of a split that has names which training never shows; the first two overlap.
NAMES: dict[str, Callable[[tuple[str, ...]], bool]] = {
    "new_name_in_text": lambda where: "text" in where,
    "new_name_in_target": lambda where: "target" in where,
    "no_new_name": lambda where: not where,
}


def load(folder: Path | None, split: str, limit: int | None) -> Benchmark:
    """The first `limit` held-out questions of a split (500 unless given); scenes that are missing are rendered."""
    if split not in SPLITS:
        raise GemvgError(f"tabletop has no split {split!r}; give {', '.join(f'tabletop:{known}' for known in SPLITS)}")
    named = held_out_named(folder or HELD_OUT, limit or QUESTIONS, split)
    root = (folder or HELD_OUT) / split
    questions = tuple(_question(k, record, root, new_name=where) for k, (record, where) in enumerate(named))
    return Benchmark("tabletop" if split == "held-out" else f"tabletop:{split}", "", root, questions, NEW_TOKENS)


def load_records(file: Path) -> Benchmark:
    """Records of one's own, each a question; the folder is the one that all their pictures lie in."""
    everything = read_all(file)
    records = [record for record in everything if record.kind != "understanding"]
    if not records:
        raise GemvgError(f"{printable(file)} has no record that is answered in boxes")
    if left := len(everything) - len(records):
        print(f"{printable(file)}: {left} records are answered in words and left out", file=sys.stderr)
    root = Path(os.path.commonpath([os.path.abspath(path.parent) for record in records for path in record.images]))
    questions = tuple(_question(k, record, root) for k, record in enumerate(records))
    return Benchmark("records", "", root, questions, NEW_TOKENS)


def _question(number: int, record: Record, root: Path, **extra: Any) -> Question:
    images = tuple(Path(os.path.relpath(path, root)) for path in record.images)
    told = {"kind": record.kind, **extra}
    part = record.source.partition(":")[2] or record.source
    return Question(str(number), part, images, record.sizes, record.query, record.boxes, extra=told)


def evaluate(model: Model, records: Sequence[Record], name: str) -> tuple[dict[str, Any], list[str]]:
    """Ask a model and score it: the scores, milliseconds and decoded tokens a question, and the texts."""
    said = []
    for record in tqdm(records, desc=name, leave=False):
        said.append(model.say([load_image(path) for path in record.images], record.query))
    counts = count([answer.boxes for answer in said], [record.boxes for record in records])
    parts = [record.source.partition(":")[2] for record in records]
    row = {
        **_scores(counts, [record.kind for record in records], parts, [not record.boxes for record in records]),
        "ms": sum(answer.ms for answer in said) / len(records),
        "tokens": sum(answer.tokens for answer in said) / len(records),
    }
    return {**row, "counts": counts}, [answer.text for answer in said]


class Row(NamedTuple):
    """What scoring keeps of an answer."""

    number: int
    id: str
    task: str
    kind: str
    no_target: bool
    new_name: tuple[str, ...]  # where it has one: in its "text", in a "target"
    ms: float
    tokens: int
    counts: Counts  # (1, columns) of scoring.Counts


def count_answers(answers: Iterable[Answered]) -> list[Row]:
    """Every answer's counts, in the order of the questions."""
    rows = []
    for said in answers:
        new, counts = said.extra.get("new_name"), count([said.boxes], [said.truth])
        about = str(said.extra.get("kind")), not said.truth, tuple(map(str, new)) if isinstance(new, list) else ()
        rows.append(Row(said.number, said.id, said.part, *about, said.ms, said.tokens, counts))
    return sorted(rows, key=lambda row: row.number)


def rate(rows: Sequence[Row]) -> Rated:
    """Every answer's values, named as in VALUES."""
    return Rated.of(((row.number, row.id, row.task, row.counts[0, [5, 4]].tolist()) for row in rows), VALUES)


def counts_of(rows: Sequence[Row]) -> Counts:
    """The counts of all answers, a row each."""
    return np.concatenate([row.counts for row in rows]) if rows else np.zeros((0, 6))


def score(rows: Sequence[Row]) -> dict[str, Any]:
    """F1 and the rest over all, by kind and by task, and of questions with a new name apart from the others."""
    counts = counts_of(rows)
    scores = _scores(counts, [r.kind for r in rows], [r.task for r in rows], [r.no_target for r in rows])
    if any(row.new_name for row in rows):
        for name, fits in NAMES.items():
            scores[name] = _brief(counts[[k for k, row in enumerate(rows) if fits(row.new_name)]])
    tasks = scores["tasks"].values()
    macro = {key: sum(task[key] for task in tasks) / max(1, len(tasks)) for key in ("f1", "exact", "image_accuracy")}
    spent = {key: sum(getattr(row, key) for row in rows) / max(1, len(rows)) for key in ("ms", "tokens")}
    return {**scores, **spent, "macro": {**macro, "n": len(rows), "parts": len(tasks)}}


def _scores(counts: Counts, kinds: Sequence[str], tasks: Sequence[str], empty: Sequence[bool]) -> dict[str, Any]:
    def by(labels: Sequence[str]) -> dict[str, Any]:
        rows = {label: [k for k, other in enumerate(labels) if other == label] for label in sorted(set(labels))}
        return {label: _brief(counts[places]) for label, places in rows.items()}

    none = _brief(counts[[k for k, e in enumerate(empty) if e]])
    return {**asdict(score_counts(counts)), "no_target": none, "kinds": by(kinds), "tasks": by(tasks)}


def _brief(counts: Counts) -> dict[str, Any]:
    """The scores of a part that a table tells."""
    scores = asdict(score_counts(counts))
    return {key: scores[key] for key in ("n", "f1", "f1_interval", "image_accuracy", "exact", "exact_interval")}
