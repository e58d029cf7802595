"""A model's text, piece by piece: boxes in every form that is written, and what is named beside them.

Knows how Qwen's models, Migician, UniVG-R1 and ours write; not which of it a checkpoint may write, and no pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from gemvg_edge.numbering import NAMED, NUMBER, number_of

BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"
REF_START, REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
_VALUE = rf"-?{NUMBER}(?:\.\d{{1,9}})?"
_CORNER = rf"\(\s*{_VALUE}\s*,\s*{_VALUE}\s*\)"
_FOUR = rf"{_VALUE}(?:\s*,\s*{_VALUE}){{3}}"
NAME_LENGTH = 200  # characters of an object's name in an answer; a longer one is cut or is none
OBJECT = 2000  # characters of a box in JSON: each opening brace is read so far at most, or many would take for ever
_PIECES = re.compile(
    rf"(?P<image>{NAMED})"
    rf"|{re.escape(REF_START)}(?P<name>[^<]{{0,{NAME_LENGTH}}}){re.escape(REF_END)}"
    rf"|(?P<quad><\|quad_start\|>[^<]*)"
    rf"|(?P<digits>{_CORNER}\s*,\s*{_CORNER}|\(\s*{_FOUR}\s*\)|\[\s*{_FOUR}\s*\])"
    rf"|(?P<locations>(?:<loc_{NUMBER}>){{4}})"
    rf"|(?P<few>(?:<loc_{NUMBER}>){{1,3}})"
    rf"|(?P<broken>{re.escape(BOX_START)}\s*|\"bbox_2d\"(?:\s*:\s*\[[^][{{}}]*]?)?)"
    r"|(?P<brace>\{(?=\s*\"))",
    re.IGNORECASE | re.ASCII,
)
_DECODER = json.JSONDecoder()


Span = tuple[int, int]  # of characters of a text: the first, and the one after the last


class NamedImage(NamedTuple):
    """Boxes that follow lie in it, unless they say otherwise."""

    image: int  # 0-based


class NamedObject(NamedTuple):
    """What the boxes that follow are called."""

    label: str | None


class BrokenBox(NamedTuple):
    """One that was meant and cannot be read."""

    fault: str


class WrittenBox(NamedTuple):
    """Four numbers, in a frame that the checkpoint decides."""

    kind: Literal["digits", "locations", "json"]
    values: Sequence[float]  # x1, y1, x2, y2
    image: int | None = None  # 0-based, where the box itself names it
    label: str | None = None  # and what it says lies there
    spans: Sequence[Span] = ()  # the characters that say that it is there, and where


def scan(body: str) -> Iterator[NamedImage | NamedObject | BrokenBox | WrittenBox]:
    """What an answer says, in its order; text inside a box of JSON, such as its label, says nothing else."""
    at = 0
    opening: list[Span] = []  # of what opened the next box: the line of its picture, and the token before it
    while piece := _PIECES.search(body, at):
        at = piece.end()
        values = [float(v) if "." in v else int(v) for v in re.findall(_VALUE, piece[0], re.ASCII)]
        spans = [*opening, piece.span()]
        opening = []
        if piece["image"]:
            opening = [(piece.start() - body[: piece.start()].endswith("\n"), at)]
            yield NamedImage(number_of(piece))
        elif piece["name"] is not None:
            yield NamedObject(piece["name"].strip() or None)
        elif piece["quad"]:  # Qwen's other shape, whose first two corners are no box
            yield BrokenBox("a quadrilateral is no box")
        elif piece["digits"]:
            yield WrittenBox("digits", values, spans=spans)
        elif piece["locations"]:
            yield WrittenBox("locations", [int(v) for v in re.findall(r"\d+", piece[0])], spans=spans)
        elif piece["few"]:
            yield BrokenBox("a box has fewer than four locations")
        elif piece["broken"]:
            following = _PIECES.match(body, at)
            if following and (following["digits"] or following["locations"]):
                opening = spans
            else:
                yield BrokenBox("a box was started and not finished")
        elif found := _read_object(body, piece.start()):
            box, at = found
            if box is not None:
                yield box


def _read_object(body: str, start: int) -> tuple[BrokenBox | WrittenBox | None, int] | None:
    """The JSON object that starts here as a box, and where it ends; None if it is not whole or holds others.

    One of other fields is no box, and its numbers are of unknown kind.
    """
    text = body[start : start + OBJECT]
    if "}" not in text:
        return None
    try:
        said, length = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    end = start + length
    if "bbox_2d" not in said:
        return None if '"bbox_2d"' in text[:length] else (None, end)
    values, number = said["bbox_2d"], said.get("image_id", said.get("image"))
    if not isinstance(values, list) or len(values) != 4 or not all(map(_is_number, values)):
        return BrokenBox("a bbox_2d is not four numbers"), end
    if number is not None and type(number) is not int:
        return BrokenBox("a bbox_2d names its picture by something else than a number"), end
    label = said.get("label")
    label = label.strip()[:NAME_LENGTH] if isinstance(label, str) else ""
    image = None if number is None else number - 1
    return WrittenBox("json", values, image, label or None, [(start, end)]), end


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not below anything
