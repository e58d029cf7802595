"""ODINW-13: COCO AP of 13 detection sets, by two protocols that must never be compared with each other.

    FOLDER/AerialMaritimeDrone/large/valid/{annotations_without_background.json, *.jpg}, and so on: see SETS

Layout: the `odinw` folder of GLIP and mmdetection (configs/odinw). `all-classes` asks for all classes of a set at once
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
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.boxes.answers import Answered, Benchmark, Question
from bench.boxes.coco_ap import Boxes, average_precision, resampled_ap
from bench.boxes.rated import Rated
from bench.boxes.scoring import interval
from gemvg_edge.boxes import Box, Size, from_steps
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable
from gemvg_edge.json_object import short
from train.data.annotations import (
    MALFORMED,
    entries,
    identity,
    index_by_id,
    inside,
    numbers,
    read_json,
    read_size,
    with_ids,
)
from train.data.pictures import measure_as
from train.data.record import Fault

ALL, PRESENT = "all-classes", "present-classes"
PROTOCOLS = (ALL, PRESENT)
LAYOUT = "unpack the 13 sets of ODINW (mmdetection's configs/odinw says from where) into one folder"
VALID, NAMES = "valid", "annotations_without_background.json"
# Where each set lies, and its classes in the order that mmdetection and the prompt have them.
SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "AerialMaritimeDrone": ("AerialMaritimeDrone/large", ("boat", "car", "dock", "jetski", "lift")),
    "Aquarium": (
        "Aquarium/Aquarium Combined.v2-raw-1024.coco",
        ("fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"),
    ),
    "CottontailRabbits": ("CottontailRabbits", ("Cottontail-Rabbit",)),
    "EgoHands": ("EgoHands/generic", ("hand",)),
    "NorthAmericaMushrooms": (
        "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco",
        ("CoW", "chanterelle"),
    ),
    "Packages": ("Packages/Raw", ("package",)),
    "PascalVOC": (
        "PascalVOC",
        ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
         "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    ),
    "pistols": ("pistols/export", ("pistol",)),
    "pothole": ("pothole", ("pothole",)),
    "Raccoon": ("Raccoon/Raccoon.v2-raw.coco", ("raccoon",)),
    "ShellfishOpenImages": ("ShellfishOpenImages/raw", ("Crab", "Lobster", "Shrimp")),
    "thermalDogsAndPeople": ("thermalDogsAndPeople", ("dog", "person")),
    "VehiclesOpenImages": ("VehiclesOpenImages/416x416", ("Ambulance", "Bus", "Car", "Motorcycle", "Truck")),
}  # fmt: skip
NEW_TOKENS = 1024
KINDS = (("ap", "scored"), ("ap_constant_score", "published"))  # a figure's name, and the boxes that it is of
LONGEST = 200_000  # characters of an answer that Python's own parser is given
_PYTHON = re.compile(r"[\\']|null|true|false|NaN|Infinity")
_FENCE = re.compile(r"^```json[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Picture:
    """One picture of a set."""

    number: int  # its place in the annotations
    path: Path
    size: Size
    truth: tuple[Box, ...]  # labelled by class


def load(folder: Path, own_words: bool, protocols: Iterable[str] = PROTOCOLS) -> Benchmark:
    """The questions of both protocols, or of one, about every set; GemvgError names what is not as published."""
    missing = [name for name in SETS if not is_file(_annotations(folder, name)[0])]
    if missing:
        raise GemvgError(f"{printable(_annotations(folder, missing[0])[0])}: no such file; {LAYOUT}")
    questions: list[Question] = []
    for name in SETS:
        pictures = list(_pictures(folder, name))
        for protocol in protocols:
            questions += [q for picture in pictures for q in _ask(picture, name, protocol, own_words, folder)]
    return Benchmark(
        "odinw13", "", folder, tuple(questions), tuple(f"{p}/{name}" for p in protocols for name in SETS), NEW_TOKENS
    )


def _annotations(folder: Path, name: str) -> tuple[Path, Path]:
    """(the annotations of a set, the folder that its pictures are named from)."""
    place = folder / SETS[name][0]
    return (place / f"val_{NAMES}", place) if name == "pistols" else (place / VALID / NAMES, place / VALID)


def _pictures(folder: Path, name: str) -> Iterable[Picture]:
    file, place = _annotations(folder, name)
    content = read_json(file, dict, LAYOUT)
    classes = {name.lower(): name for name in SETS[name][1]}
    indexed = index_by_id(with_ids(entries(content, "categories", file)), "category", printable(file))
    known = {key: classes[str(entry.get("name")).lower()] for key, entry in indexed.entries.items()
             if str(entry.get("name")).lower() in classes}  # fmt: skip
    if lacking := set(classes.values()) - set(known.values()):
        raise GemvgError(f"{printable(file)} has no class {sorted(lacking)[0]!r}; {LAYOUT}")
    boxes: dict[Any, list[Box]] = {}
    for number, entry in enumerate(entries(content, "annotations", file)):
        try:
            x, y, w, h = numbers(entry["bbox"], 4)
            label = known.get(identity(entry, "category_id"))  # type: ignore[arg-type]
            crowd = 1.0 if entry.get("iscrowd") else None
        except MALFORMED as error:
            raise GemvgError(f"{printable(file)}, annotation {number} is malformed ({error}); {LAYOUT}") from None
        if label is None:
            raise GemvgError(f"{printable(file)}, annotation {number} is of none of the set's classes; {LAYOUT}")
        boxes.setdefault(identity(entry, "image_id"), []).append(Box(0, x, y, x + w, y + h, label=label, score=crowd))
    for number, entry in enumerate(entries(content, "images", file)):
        try:
            path, size = inside(place, entry["file_name"]), read_size(entry)
        except MALFORMED as error:
            raise GemvgError(f"{printable(file)}, image {number} is malformed ({error}); {LAYOUT}") from None
        if isinstance(found := measure_as(path, size), Fault):
            raise GemvgError(f"{found.where} is {found.reason}; {LAYOUT}; `bench.score --answers` needs no pictures")
        yield Picture(number, path, size, tuple(boxes.get(identity(entry), ())))


def _ask(picture: Picture, name: str, protocol: str, own_words: bool, folder: Path) -> Iterable[Question]:
    classes = SETS[name][1]
    if protocol == ALL and not own_words:
        wanted = ", ".join(classes)
        text = f"Locate every instance that belongs to the following categories: '{wanted}'."
        yield _question(picture, name, protocol, "", wanted, f"{text} Report bbox coordinates in JSON format.", folder)
        return
    present = {box.label for box in picture.truth}
    for label in classes if protocol == ALL else [label for label in classes if label in present]:
        text = f"Locate every {label} in the image and output the coordinates in JSON format."
        yield _question(picture, name, protocol, label, f"every {label}", text, folder)


def _question(
    picture: Picture, name: str, protocol: str, label: str, query: str, published: str, folder: Path
) -> Question:
    return Question(
        f"{protocol}/{name}/{picture.number}" + (f"/{label}" if label else ""),
        f"{protocol}/{name}",
        (picture.path.relative_to(folder),),
        (picture.size,),
        query,
        tuple(box for box in picture.truth if label in ("", box.label)),
        published,
        {"picture": picture.number, "asked_for": label},
    )


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
        if isinstance(corners, list) and len(corners) == 4 and all(map(_is_number, corners)) and isinstance(label, str):
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


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12 and isfinite(value)


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
        if protocol not in PROTOCOLS or name not in SETS or type(picture) is not int or not isinstance(label, str):
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
        drawn = resampled_ap(boxes.truth, boxes.scored, boxes.pictures)
        told["ap_interval"] = interval(drawn)
        again.setdefault(part.partition("/")[0], []).append(drawn)
        tasks[part] = told
    macro: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        if parts := [told for part, told in tasks.items() if part.startswith(f"{protocol}/")]:
            macro[protocol] = {key: _mean([told[key] for told in parts]) for key, _ in KINDS}
            macro[protocol]["ap_interval"] = interval(np.mean(again[protocol], axis=0))
            macro[protocol] |= {"n": sum(told["n"] for told in parts), "parts": len(parts), "of": len(SETS)}
    return {"tasks": tasks, "macro": macro}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
