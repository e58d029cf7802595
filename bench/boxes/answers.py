"""A benchmark's questions, and the file of what a model answered: one JSON line each, with all that scoring needs.

The first line says what was asked of whom. An answer's line has the question and its true boxes beside the model's
text, so that it is scored, compared and looked at without the data set; only the gallery opens pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from bench.boxes.asking import Said
from gemvg_edge.boxes import Box, Size
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable
from gemvg_edge.json_object import short
from train.journal import Line, read_journal

FORMAT, VERSION = "gemvg-edge-answers", 1
MOST_TRUE, MOST_BOXES = 1000, 10_000  # boxes of a question and of an answer, which are matched one by one
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One question of a benchmark; boxes in pixels of the originals."""

    id: str  # within its benchmark
    part: str  # what the benchmark tells apart: a task, a split, a data set
    images: tuple[Path, ...]  # relative to the benchmark's folder
    sizes: tuple[Size, ...]  # (width, height) of each
    query: str  # what a model that was trained on this project's words is asked
    truth: tuple[Box, ...]  # `label` is the class or the group, where there are any
    published: str | None = None  # the whole text that the protocol asks; None: it has no words of its own
    extra: Mapping[str, Any] = field(default_factory=dict)  # what only its scorer reads


@dataclass(frozen=True)
class Benchmark:
    """A data set as its authors publish it."""

    task: str
    version: str  # of the data or the protocol, where there are several
    folder: Path
    questions: tuple[Question, ...]
    new_tokens: int  # of an answer, at most


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with what a model said; the fields of a line."""

    id: str
    number: int  # the question's place in its benchmark: the order of equal scores
    part: str
    images: list[str]
    sizes: list[Size]
    query: str
    truth: list[Box]
    answer: str  # the model's text
    boxes: list[Box]  # as written, pixels of the originals
    thinking: str
    problem: str | None
    tokens: int
    ms: float
    extra: dict[str, Any]


def to_line(number: int, question: Question, asked: str, said: Said) -> Line:
    """What is saved of one answer."""
    return {
        "id": question.id,
        "number": number,
        "part": question.part,
        "images": [image.as_posix() for image in question.images],
        "sizes": [list(size) for size in question.sizes],
        "query": question.query,
        **({} if asked == question.query else {"asked": asked}),
        "truth": [write_box(box) for box in question.truth],
        "answer": said.text,
        "boxes": [write_box(box) for box in said.boxes[:MOST_BOXES]],
        "thinking": said.thinking,
        "problem": said.problem,
        "tokens": said.tokens,
        "ms": round(said.ms, 3),
        "extra": dict(question.extra),
    }


def read_answers(file: Path) -> tuple[Line, Iterator[Answered]]:
    """The header of a file of answers and its answers, one at a time; GemvgError for what is none."""
    header, lines = read_journal(file)
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        found = f"{short(header.get('format'))} version {short(header.get('version'))}"
        raise GemvgError(f"{printable(file)} is {found}, not {FORMAT} version {VERSION}; make it with bench.accuracy")
    if not isinstance(header.get("task"), str):
        raise GemvgError(f"{printable(file)} does not say of which task it is; make it with bench.accuracy")
    return header, (from_line(line, file) for line in lines)


def from_line(line: Line, file: Path) -> Answered:
    """A line with its fields checked; GemvgError names the one that is wrong."""

    def take(key: str, kind: type[T] | tuple[type[T], ...], fits: Callable[[Any], bool] = lambda _: True) -> Any:
        value = line.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
            raise GemvgError(
                f"{printable(file)}, answer {short(line.get('id'))}: {key} is {short(value)}, which no such line has; "
                "make the file with bench.accuracy"
            )
        return value

    sizes = take("sizes", list, lambda sizes: all(map(_is_size, sizes)))
    count = len(take("images", list, lambda names: len(names) == len(sizes) and all(type(n) is str for n in names)))
    truth = take("truth", list, lambda found: len(found) <= MOST_TRUE and all(_is_box(box, count) for box in found))
    boxes = take("boxes", list, lambda found: len(found) <= MOST_BOXES and all(_is_box(box, count) for box in found))
    return Answered(
        take("id", str),
        take("number", int, lambda number: number >= 0),
        take("part", str),
        line["images"],
        [(width, height) for width, height in sizes],
        take("query", str),
        [_read_box(box) for box in truth],
        take("answer", str),
        [_read_box(box) for box in boxes],
        take("thinking", str),
        take("problem", (str, type(None))),
        take("tokens", int),
        float(take("ms", (int, float))),
        take("extra", dict),
    )


def write_box(box: Box) -> dict[str, Any]:
    """A box as a line has it."""
    said: dict[str, Any] = {"image": box.image, "box": list(box)}
    if box.label is not None:
        said["label"] = box.label
    if box.score is not None:
        said["score"] = box.score
    return said


def _read_box(said: Mapping[str, Any]) -> Box:
    return Box(said["image"], *map(float, said["box"]), label=said.get("label"), score=said.get("score"))


def _is_box(said: Any, images: int) -> bool:
    if not isinstance(said, dict) or type(said.get("image")) is not int or not 0 <= said["image"] < images:
        return False
    corners, label, score = said.get("box"), said.get("label"), said.get("score")
    return (
        isinstance(corners, list)
        and len(corners) == 4
        and all(map(is_number, corners))
        and (label is None or isinstance(label, str))
        and (score is None or is_number(score))
    )


def is_number_id(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number that may name an image."""
    return type(value) is int and 0 <= value < 2**53


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)


def is_number(value: Any) -> bool:
    """Whether a value is a number that a coordinate may be."""
    return type(value) in (int, float) and abs(value) < 1e12 and isfinite(value)


def spread(questions: Sequence[Question], limit: int) -> list[int]:
    """The numbers of the first `limit` questions, the parts in turn: a larger limit has the same and some more."""
    by_part: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        by_part.setdefault(question.part, []).append(number)
    rounds = [(place, k, number) for k, numbers in enumerate(by_part.values()) for place, number in enumerate(numbers)]
    return sorted(number for _, _, number in sorted(rounds)[:limit])
