"""RefCOCO, RefCOCO+ and RefCOCOg: Acc@0.5 of the first box, by split.

    FOLDER/refcoco/{refs(unc).p, instances.json}, FOLDER/refcoco+/.., FOLDER/refcocog/{refs(umd).p, ..}
    FOLDER/images/mscoco/images/train2014/COCO_train2014_000000581857.jpg

Layout: github.com/lichengunc/refer, whose `data` folder FOLDER is; it may be one of the three folders too. An answer is
right if its first box has an IoU (continuous, in pixels) of at least 0.5, as Qwen-VL's and MDETR's evaluations count.
The authors ask nothing in words, so a model gets the expression in its own profile's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.boxes.answers import Answered, Benchmark, Question
from bench.boxes.rated import Rated, means
from gemvg_edge.boxes import iou
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder, printable
from train.data.record import Fault, Record, check
from train.data.refcoco import LAYOUT, PICTURES, read_refcoco, split_by

SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
VALUES = ("acc@0.5", "mean_iou")
NEW_TOKENS = 256


def load(name: str, folder: Path, split: str) -> Benchmark:
    """Every expression of one split, or of all with split ""; GemvgError for what is not as published."""
    splits = SPLITS[name]
    if split and split not in splits:
        raise GemvgError(f"{name} has no split {split!r}; give {', '.join(f'{name}:{known}' for known in splits)}")
    folder = Path(os.path.abspath(folder))
    own = folder / name if is_folder(folder / name) else folder
    if own.name != name and own.name in SPLITS:
        raise GemvgError(f"{printable(own)} is another data set than {name}; give the folder of that, or the one above")
    root = own.parent
    authors = split_by(own)
    if authors == "google":
        print(
            f"{printable(own)} has Google's split alone, whose figures are not those that are published",
            file=sys.stderr,
        )
    questions: list[Question] = []
    for one in [split] if split else splits:
        found = list(_records(own, one))
        for number, record in enumerate(found):
            images = tuple(path.relative_to(root) for path in record.images)
            questions.append(Question(f"{one}/{number}", one, images, record.sizes, record.query, record.boxes))
        if not found:
            raise GemvgError(f"{printable(own)} has no expressions of the split {one}; {LAYOUT}")
    return Benchmark(f"{name}:{split}" if split else name, authors, root, tuple(questions), NEW_TOKENS)


def _records(folder: Path, split: str) -> Iterable[Record]:
    for item in read_refcoco(folder, split, folder.parent / PICTURES):
        fault = item if isinstance(item, Fault) else None
        if fault is None and (reason := check(item)):  # type: ignore[arg-type]
            fault = Fault(f"{folder.name} {split}: {item.query[:60]!r}", reason)  # type: ignore[union-attr]
        if fault:
            raise GemvgError(f"{printable(fault.where)}: {fault.reason}; a benchmark is scored whole: {LAYOUT}")
        yield item  # type: ignore[misc]


def rate(answers: Iterable[Answered]) -> Rated:
    """Every answer's values, named as in VALUES."""
    return Rated.of((_row(answer) for answer in answers), VALUES)


def _row(answer: Answered) -> tuple[int, str, str, list[float]]:
    if len(answer.truth) != 1:
        raise GemvgError(f"answer {answer.id}: {len(answer.truth)} true boxes, where an expression has one")
    overlap = iou(answer.boxes[0], answer.truth[0]) if answer.boxes else 0.0
    return answer.number, answer.id, answer.part, [float(overlap >= 0.5), overlap]


def score(rated: Rated, task: str) -> dict[str, Any]:
    """Accuracy by split, and the mean over splits."""
    name, _, split = task.partition(":")
    return means(rated, (split,) if split else SPLITS.get(name, ()))
