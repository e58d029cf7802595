"""Boxes <-> text: the grammar of an answer, in digits or in location tokens. Shared with rewards and scorers.

Written: one line an image with targets, boxes sorted by (image, x1, y1); no target is `None`:

    Image-2: <|box_start|>(x1,y1),(x2,y2)<|box_end|><|box_start|>...     digits, 0..1000 of the image's own size
    Image-2: <|box_start|><loc_3><loc_40><loc_64><loc_90><|box_end|>     location tokens, 0..N-1 of the image's own size

With reasoning: `<think>...</think><answer>the same</answer>`. A query may show a box as well, always in digits
(`mark`); `localise` turns it into what the checkpoint reads.

Read: those, with or without `<think>..</think><answer>..</answer>`, and what Migician ("It's in the third image. ..."),
Qwen2-VL and UniVG-R1 write. The format is ours: GeM-VG's own was never published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gemvg_edge.boxes import RELATIVE_FRAME, Box, from_steps, to_steps
from gemvg_edge.errors import GemvgError

NO_TARGET = "None"
BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
# Nine digits are past every frame already, and int() refuses what a model that repeats itself may write (over 4,300).
_NUMBER = r"\d{1,9}"
_CORNER = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_MARK = re.compile(rf"{re.escape(BOX_START)}\s*({_CORNER}\s*,\s*{_CORNER})\s*{re.escape(BOX_END)}", re.ASCII)
# An image is named as "Image-2" (ours, MGrounding-630k), "third image" (Migician) or "2th image" (MIG-Bench).
_PIECES = re.compile(
    rf"image[-\s](?P<number>{_NUMBER})|(?P<nth>{_NUMBER})(?:st|nd|rd|th) image"
    rf"|(?P<ordinal>{'|'.join(_ORDINALS)}) image"
    rf"|(?P<digits>{_CORNER}\s*,\s*{_CORNER})"
    rf"|(?P<locations>(?:<loc_{_NUMBER}>){{4}})"
    rf"|(?P<broken>{re.escape(BOX_START)}\s*)",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True)
class AnswerFormat:
    """How a checkpoint writes coordinates; kept under `grounding.answer` of its config.json."""

    coordinates: Literal["digits", "locations"] = "digits"
    locations: int = 0  # how many <loc_k> tokens the vocabulary has

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> AnswerFormat:
        """Read the two fields and check that they fit each other."""
        answer = AnswerFormat(**config)
        if answer.coordinates not in ("digits", "locations"):
            raise GemvgError(f"grounding.answer.coordinates is {answer.coordinates!r}; use 'digits' or 'locations'")
        if answer.coordinates == "locations" and answer.locations < 2:
            raise GemvgError(f"grounding.answer.locations is {answer.locations}; location tokens need at least 2")
        return answer

    def to_config(self) -> dict[str, Any]:
        """The same fields as plain JSON values."""
        return asdict(self)

    @property
    def steps(self) -> int:
        """The largest coordinate: 1000 in digits, the last location token's number otherwise."""
        return RELATIVE_FRAME if self.coordinates == "digits" else self.locations - 1


@dataclass(frozen=True)
class Answer:
    """What a text says: boxes in original pixels, the reasoning before them, and what was wrong, if anything."""

    boxes: tuple[Box, ...]
    thinking: str = ""
    problem: str | None = None


def write_answer(
    boxes: Sequence[Box], sizes: Sequence[tuple[int, int]], answer_format: AnswerFormat, thinking: str | None = None
) -> str:
    """Boxes in original pixels, with each image's (width, height), as the text that the model learns to write.

    With `thinking` the reasoning comes first and the answer stands in its tags.
    """
    lines: dict[int, str] = {}
    for box in sorted(boxes):
        lines.setdefault(box.image, f"Image-{box.image + 1}: ")
        lines[box.image] += _write_box(to_steps(box, sizes[box.image], answer_format.steps), answer_format)
    answer = "\n".join(lines.values()) or NO_TARGET
    return answer if thinking is None else f"<think>{thinking}</think><answer>{answer}</answer>"


def mark(box: Box, size: tuple[int, int]) -> str:
    """A box (original pixels) of a picture of (width, height) as a query shows it.

    `f"the same mug as {mark(box, size)} in image 1"`; every checkpoint and bundle takes it, whatever its coordinates.
    """
    return _write_box(to_steps(box, size, RELATIVE_FRAME), AnswerFormat())


def localise(query: str, answer_format: AnswerFormat) -> str:
    """The query with the boxes that it shows in the coordinates that the checkpoint knows."""
    if answer_format.coordinates == "digits":
        return query

    def write(piece: re.Match[str]) -> str:
        values = [int(v) for v in re.findall(r"\d+", piece[1])]
        steps = answer_format.steps
        return _write_box([min(steps, round(v * steps / RELATIVE_FRAME)) for v in values], answer_format)

    return _MARK.sub(write, query)


def _write_box(values: Sequence[int], answer_format: AnswerFormat) -> str:
    if answer_format.coordinates == "locations":
        text = "".join(f"<loc_{v}>" for v in values)
    else:
        text = "({},{}),({},{})".format(*values)
    return f"{BOX_START}{text}{BOX_END}"


def read_answer(text: str, sizes: Sequence[tuple[int, int]], answer_format: AnswerFormat) -> Answer:
    """A model's text, with each image's (width, height), as boxes in original pixels.

    Never raises: what cannot be read is left out and named in `problem`. An answer to one picture need not number it;
    to several it must, since a box in the wrong picture is worse than none.
    """
    thinking, body, problem = _split_thinking(text)
    boxes: list[Box] = []
    image = 0 if len(sizes) == 1 else None
    pieces = list(_PIECES.finditer(body))
    for at, piece in enumerate(pieces):
        if (number := _image_number(piece)) is not None:
            image = number - 1
            continue
        if piece["broken"]:
            followed = at + 1 < len(pieces) and pieces[at + 1].start() == piece.end()
            if not (followed and (pieces[at + 1]["digits"] or pieces[at + 1]["locations"])):
                problem = problem or "a box was started and not finished"
            continue
        if image is None:
            problem = problem or "a box names none of the pictures"
            continue
        box, fault = _read_box(piece, image, sizes, answer_format)
        if box is None:
            problem = problem or fault
        else:
            boxes.append(box)
    if not boxes and problem is None and body.strip().lower() != NO_TARGET.lower():
        problem = "no box and no 'None' in the answer"
    return Answer(tuple(sorted(boxes)), thinking, problem)


def _split_thinking(text: str) -> tuple[str, str, str | None]:
    """(reasoning, answer, problem) of a text that may wrap them in <think> and <answer>."""
    for token in ("<|im_end|>", "<|endoftext|>"):
        text = text.split(token)[0]
    thinking = re.search(r"<think>(.*?)(</think>|$)", text, re.DOTALL)
    body = re.search(r"<answer>(.*?)(</answer>|$)", text, re.DOTALL)
    if thinking and not thinking[2]:
        return thinking[1].strip(), "", "the reasoning was not finished"
    if body:
        return (thinking[1].strip() if thinking else ""), body[1], None if body[2] else "the answer was not closed"
    if thinking:
        return thinking[1].strip(), text[thinking.end() :], None
    return "", text, None


def _image_number(piece: re.Match[str]) -> int | None:
    """The 1-based image that this piece names, if it names one."""
    if piece["ordinal"]:
        return _ORDINALS.index(piece["ordinal"].lower()) + 1
    number = piece["number"] or piece["nth"]
    return int(number) if number else None


def _read_box(
    piece: re.Match[str], image: int, sizes: Sequence[tuple[int, int]], answer_format: AnswerFormat
) -> tuple[Box | None, str | None]:
    values = [int(v) for v in re.findall(r"\d+", piece[0])]
    if piece["locations"] and answer_format.coordinates != "locations":
        return None, "the answer has location tokens, which this model does not use"
    steps = answer_format.steps if piece["locations"] else RELATIVE_FRAME
    if not 0 <= image < len(sizes):
        return None, f"image {image + 1} was named, of {len(sizes)}"
    if max(values) > steps:
        return None, f"a coordinate of {max(values)} is past {steps}"
    if values[0] >= values[2] or values[1] >= values[3]:
        return None, "a box has no width or no height"
    return from_steps(image, values, sizes[image], steps), None
