"""Boxes that a query shows: always written in digits, 0..1000, and turned into what a checkpoint reads when asked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from gemvg_edge.answer import AnswerFormat, write_box
from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.boxes import RELATIVE_FRAME, RELATIVE_STEPS, Box, Size, change_steps, to_steps
from gemvg_edge.errors import GemvgError

_NUMBER = r"\d{1,9}"
_CORNER = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_MARK = re.compile(rf"{re.escape(BOX_START)}\s*({_CORNER}\s*,\s*{_CORNER})\s*{re.escape(BOX_END)}", re.ASCII)
PIXEL_SLACK = 1.0  # a box that is shown may end this far outside its picture: data sets round


def mark(box: Box, size: Size) -> str:
    """A box (original pixels) of a picture of (width, height) as a query shows it.

    `f"the same mug as {mark(box, size)} in image 1"`; every checkpoint and bundle takes it, whatever its coordinates.
    GemvgError for a box without an area, or outside a picture of that size: it may be another picture's.
    """
    width, height = size
    corners = (box.x1, box.y1, box.x2, box.y2)
    if not (width > 0 and height > 0 and all(map(math.isfinite, corners)) and box.x1 < box.x2 and box.y1 < box.y2):
        raise GemvgError(f"{box} in a picture of {width} x {height} has no area; give x1 < x2 and y1 < y2, in pixels")
    if min(corners) < -PIXEL_SLACK or box.x2 > width + PIXEL_SLACK or box.y2 > height + PIXEL_SLACK:
        raise GemvgError(f"{box} ends outside its picture of {width} x {height}; give that picture's own size")
    return write_box(to_steps(box, size, RELATIVE_STEPS), AnswerFormat())


def shows_box(query: str) -> bool:
    """Whether a query shows a box."""
    return _MARK.search(query) is not None


def check_marks(query: str) -> None:
    """GemvgError for a box in a query that is past 0..1000 or has no area."""
    for piece in _MARK.finditer(query):
        x1, y1, x2, y2 = (int(v) for v in re.findall(r"\d+", piece[1]))
        if max(x1, y1, x2, y2) > RELATIVE_FRAME or x1 >= x2 or y1 >= y2:
            raise GemvgError(
                f"the query shows the box {piece[0][:80]}, which is none; write it as `mark` does, in "
                f"0..{RELATIVE_FRAME} of the picture's size, with x1 < x2 and y1 < y2"
            )


def localise(query: str, answer_format: AnswerFormat, resized: Sequence[Size] | None = None) -> str:
    """The query with the boxes that it shows in the coordinates that the checkpoint knows.

    Pixels need each picture's `resized` (width, height). A query does not say which picture a box of it lies in, so
    all must have one size; GemvgError otherwise.
    """
    if answer_format.coordinates in ("digits", "json") or not _MARK.search(query):
        return query
    if answer_format.coordinates == "pixels" and len(set(resized or ())) > 1:
        found = ", ".join(f"{width} x {height}" for width, height in dict.fromkeys(resized or ()))
        raise GemvgError(
            f"the query shows a box, which this model reads in pixels, but its pictures have several sizes ({found} "
            "after resizing), so that the box could lie in any; give pictures of one size or leave the box out"
        )
    steps = answer_format.steps(resized[0] if resized else None)
    marked = replace(answer_format, marks=True)  # whatever answers do, or a query's words could run into its boxes

    def write(piece: re.Match[str]) -> str:
        values = [int(v) for v in re.findall(r"\d+", piece[1])]
        return write_box(change_steps(values, RELATIVE_STEPS, steps), marked)

    return _MARK.sub(write, query)
