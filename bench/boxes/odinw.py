"""ODINW-13: COCO AP of 13 detection sets, by two protocols that must never be compared with each other.

`all-classes` asks for all classes of a set at once
(Qwen3-VL, evaluation/ODinW-13); `present-classes` asks once for each class that is in the picture, which is far easier
(Vision-R1, eval_localization.py; likely GeM-VG's). Published answers are JSON, whose labels must be a class's name but
for capitals. A model that was trained on this project's words labels no boxes, so it is asked for one class at a time
by both protocols: by the first for those too that are not there. AP is COCO's (IoU 0.50 to 0.95, 100 boxes of a class
and a picture) with our box scores and, as the protocols have it, with one score for all; equal scores rank by picture
as the annotations list it. The figure is the unweighted mean over sets.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.boxes.answers import Answered, is_number, is_number_id
from bench.boxes.coco_ap import Boxes, average_precision, resampled_ap
from bench.boxes.odinw_data import PRESENT, PROTOCOLS, SETS
from bench.boxes.rated import Rated
from bench.boxes.scoring import interval
from gemvg_edge.boxes import from_steps
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import short

KINDS = (("ap", "scored"), ("ap_constant_score", "published"))  # a figure's name, and the boxes that it is of
LONGEST = 200_000  # characters of an answer that Python's own parser is given
_PYTHON = re.compile(r"[\\']|null|true|false|NaN|Infinity")
_FENCE = re.compile(r"^```json[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.MULTILINE)


def read_json_boxes(text: str, repair: bool) -> list[tuple[list[float], str]]:
    """(x1 y1 x2 y2, label) of a published answer, as the protocols' scripts read it: all or nothing.

    `repair`: a list that was cut off ends at its last whole object, as by Vision-R1; Qwen3-VL's script drops it.
    """
    fence = _FENCE.search(text)
    body = (fence[1] if fence else text).strip()
    found = _literal(body)
    if found is None and repair and (end := body.rfind('"}')) >= 0:
        found = _literal(body[: end + 2] + "]")
    boxes = []
    for item in found if isinstance(found, list) else []:
        corners, label = (item.get("bbox_2d"), item.get("label")) if isinstance(item, dict) else (None, None)
        if isinstance(corners, list) and len(corners) == 4 and all(map(is_number, corners)) and isinstance(label, str):
            boxes.append(([float(corner) for corner in corners], label))
    return boxes


def _literal(text: str) -> Any:
    if len(text) > LONGEST:
        return None
    try:
        if not _PYTHON.search(text):  # means the same in JSON, whose reader is ten times as fast
            return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


@dataclass(frozen=True)
class Found:
    """The boxes of one protocol and set: true ones, ours with their scores, and those that the protocol reads."""

    pictures: list[int]
    truth: Boxes
    scored: Boxes
    published: Boxes


def gather(answers: Iterable[Answered], verbatim: bool) -> dict[str, Found]:
    """Every set's boxes by its part's name; `verbatim`: the questions were the protocols' own."""
    parts: dict[str, tuple[list[_Row], list[_Row], list[_Row]]] = {}
    pictures: dict[str, set[int]] = {}
    for said in answers:
        protocol, _, name = said.part.partition("/")
        picture, label = said.extra.get("picture"), said.extra.get("asked_for")
        if protocol not in PROTOCOLS or name not in SETS or not is_number_id(picture) or not isinstance(label, str):
            raise GemvgError(f"answer {short(said.id)} is about {short(said.part)}, which is no set of ODINW-13")
        truth, scored, published = parts.setdefault(said.part, ([], [], []))
        pictures.setdefault(said.part, set()).add(picture)
        classes = {known.lower(): k for k, known in enumerate(SETS[name][1])}
        for box in said.truth:
            if (number := classes.get(str(box.label).lower())) is None:
                raise GemvgError(f"answer {short(said.id)} has a true box of {short(box.label)}, no class of {name}")
            truth.append(_Row(said.number, picture, number, box.corners, box.score or 0.0))
        for box in said.boxes:
            if (number := _class(box.label, label, classes, verbatim)) is not None:
                score = 1.0 if box.score is None else box.score
                scored.append(_Row(said.number, picture, number, box.corners, score))
        theirs = _published(said, protocol) if verbatim else ((box.corners, box.label) for box in said.boxes)
        for corners, named in theirs:
            if (number := _class(named, label, classes, verbatim)) is not None:
                published.append(_Row(said.number, picture, number, corners, 1.0))
    return {part: Found(sorted(pictures[part]), *map(_boxes, rows)) for part, rows in parts.items()}


class _Row(NamedTuple):
    question: int
    picture: int
    number: int  # of the class
    corners: tuple[float, ...]
    score: float


def _boxes(rows: list[_Row]) -> Boxes:
    """In the order of the questions, which decides between equal scores."""
    rows.sort(key=lambda row: row.question)
    return Boxes.of([row[1:] for row in rows])


def _class(named: str | None, asked: str, classes: Mapping[str, int], verbatim: bool) -> int | None:
    """The class that a box is of: what its label says, or what was asked for where the model labels nothing."""
    return classes.get((named or "").strip().lower()) if verbatim else classes.get(asked.lower())


def _published(said: Answered, protocol: str) -> Iterable[tuple[tuple[float, ...], str]]:
    """What the protocol reads in an answer, in pixels of the original."""
    frame: Any = said.extra.get("frame")
    if not isinstance(frame, list) or len(frame) != 2 or not all(type(side) is int and side > 0 for side in frame):
        raise GemvgError(f"answer {short(said.id)}: frame is {short(frame)}, no width and height")
    for corners, label in read_json_boxes(said.answer, repair=protocol == PRESENT):
        yield from_steps(0, corners, said.sizes[0], (frame[0], frame[1])).corners, label


def rate(answers: Iterable[Answered]) -> Rated:
    """AP is of a whole set, so an answer by itself has no value."""
    return Rated.of(((said.number, said.id, said.part, []) for said in answers), ())


def score(found: Mapping[str, Found]) -> dict[str, Any]:
    """AP of each set by each protocol that was asked, and each protocol's mean; `parts` says over how many sets."""
    tasks: dict[str, dict[str, Any]] = {}
    again: dict[str, list[Any]] = {}
    for part in (f"{protocol}/{name}" for protocol in PROTOCOLS for name in SETS):
        if (boxes := found.get(part)) is None:
            continue
        told: dict[str, Any] = {"n": len(boxes.pictures)}
        for key, kind in KINDS:
            told[key] = average_precision(boxes.truth, getattr(boxes, kind))
        if told["ap"] is not None:
            drawn = resampled_ap(boxes.truth, boxes.scored, boxes.pictures)
            told["ap_interval"] = interval(drawn)
            again.setdefault(part.partition("/")[0], []).append(drawn)
        tasks[part] = told
    macro: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        if parts := [told for part, told in tasks.items() if part.startswith(f"{protocol}/")]:
            macro[protocol] = {key: _mean([told[key] for told in parts]) for key, _ in KINDS}
            macro[protocol]["ap_interval"] = (
                interval(np.mean(known, axis=0)) if (known := again.get(protocol)) else None
            )
            counted = sum(told["ap"] is not None for told in parts)  # a set without true boxes has no AP
            macro[protocol] |= {"n": sum(told["n"] for told in parts), "parts": counted, "of": len(SETS)}
    return {"tasks": tasks, "macro": macro}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
