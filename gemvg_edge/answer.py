"""Boxes <-> text: the grammar of an answer, in digits, location tokens or pixels. Shared with rewards and scorers.

Written: one line an image with targets, boxes sorted by (image, x1, y1); no target is `None`:

    Image-2: <|box_start|>(x1,y1),(x2,y2)<|box_end|><|box_start|>...     digits, 0..1000 of the image's own size
    Image-2: <|box_start|>(x1,y1),(x2,y2)<|box_end|><|box_start|>...     pixels of the image as it was resized
    Image-2: <|box_start|><loc_3><loc_40><loc_64><loc_90><|box_end|>     location tokens, 0..N-1 of the image's own size
    Image-2: <loc_3><loc_40><loc_64><loc_90><loc_5>...                   the same without `marks`: every four are a box

With reasoning: `<think>...</think><answer>the same</answer>`. Boxes in a query are marks.py's.

Read: those, with or without `<think>..</think><answer>..</answer>`, and what Migician ("It's in the third image. ..."),
Qwen2-VL, UniVG-R1, Qwen2.5-VL (JSON with `bbox_2d`, in pixels) and Qwen3-VL (the same, in 0..1000) write. The format is
ours: GeM-VG's own was never published.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from gemvg_edge.answer_pieces import BOX_END, BOX_START, BrokenBox, NamedImage, NamedObject, Span, WrittenBox, scan
from gemvg_edge.boxes import (
    ABSOLUTE,
    RELATIVE,
    RELATIVE_STEPS,
    Box,
    Size,
    Steps,
    from_steps,
    to_steps,
)
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import short

NO_TARGET = "None"
# How Qwen2.5-VL and Qwen3-VL say that nothing is there.
_EMPTY_LIST = re.compile(r"(?:```(?:json)?)?\s*\[\s*\]\s*(?:```)?")
# Qwen's boxes drift past the edge, by 6 % of the side where it was seen; a box further out is not of this picture.
DRIFT = 0.08
MOST_LOCATIONS = 100_000  # tokens; a picture has fewer pixels along a side
COORDINATES = ("digits", "locations", "pixels", "json")
IN_JSON = ("pixels", "json")  # of checkpoints that write a `bbox_2d`
UNNAMED = ("refuse", "query", "each")


@dataclass(frozen=True)
class AnswerFormat:
    """How a checkpoint writes coordinates; kept under `grounding.answer` of its config.json."""

    # Pixels are those of the picture as the model sees it, after the resize; Qwen2.5-VL's own. "json": digits that
    # may also stand in JSON; Qwen3-VL's own.
    coordinates: Literal["digits", "locations", "pixels", "json"] = "digits"
    locations: int = 0  # how many <loc_k> tokens the vocabulary has
    # Which of several pictures an answer is about that names none: no box is read; or the one that the query names; or
    # that one, and where the query names none each picture is asked alone.
    unnamed: Literal["refuse", "query", "each"] = "refuse"
    # Whether <|box_start|> and <|box_end|> stand around each box of an answer; without them one of locations has two
    # tokens less. Boxes in a query have them anyway.
    marks: bool = True

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> AnswerFormat:
        """Read the fields and check that they fit each other."""
        answer = AnswerFormat(**config)
        if answer.unnamed not in UNNAMED:
            raise GemvgError(
                f"grounding.answer.unnamed is {short(answer.unnamed)}; use one of {', '.join(map(repr, UNNAMED))}"
            )
        if answer.coordinates not in COORDINATES:
            known = ", ".join(map(repr, COORDINATES))
            raise GemvgError(f"grounding.answer.coordinates is {answer.coordinates!r}; use one of {known}")
        if not 0 <= answer.locations <= MOST_LOCATIONS:
            raise GemvgError(f"locations is {short(answer.locations)}, not 0 to {MOST_LOCATIONS}")
        if answer.coordinates == "locations" and answer.locations < 2:
            raise GemvgError(f"grounding.answer.locations is {answer.locations}; location tokens need at least 2")
        if not answer.marks and (answer.coordinates != "locations" or answer.unnamed != "refuse"):
            raise GemvgError(
                "marks is false, which only answers in locations that name their pictures ('unnamed': 'refuse') can do"
            )
        return answer

    def to_config(self) -> dict[str, Any]:
        """The same fields as plain JSON values; `marks` only where it is false, since older readers do not know it."""
        return {name: value for name, value in asdict(self).items() if name != "marks" or not value}

    def about(self, named: Sequence[int]) -> int | None:
        """The picture (from 0) that an answer is about which names none, of those that its query names in turn."""
        return named[-1] if named and self.unnamed != "refuse" else None

    @property
    def coordinate_frame(self) -> dict[str, Any]:
        """What the coordinates are relative to, as a manifest says it."""
        return ABSOLUTE if self.coordinates == "pixels" else RELATIVE

    def steps(self, resized: Size | None = None) -> Steps:
        """The largest x and y in a picture; GemvgError where its resized (width, height) decides and is not given."""
        match self.coordinates:
            case "digits" | "json":
                return RELATIVE_STEPS
            case "locations":
                return self.locations - 1, self.locations - 1
            case "pixels":
                if resized is None:
                    raise GemvgError("this model's boxes are in pixels of the resized pictures; give their sizes")
                return resized


@dataclass(frozen=True)
class Answer:
    """What a text says: boxes in original pixels, the reasoning before them, and what was wrong, if anything."""

    boxes: tuple[Box, ...]
    thinking: str = ""
    problem: str | None = None


def write_answer(
    boxes: Sequence[Box],
    sizes: Sequence[Size],
    answer_format: AnswerFormat,
    thinking: str | None = None,
    resized: Sequence[Size] | None = None,
) -> str:
    """Boxes in original pixels, with each image's (width, height), as the text that the model learns to write.

    With `thinking` the reasoning comes first and the answer stands in its tags. `resized`: each image's (width, height)
    as the model sees it, for answers in pixels; GemvgError where it is missing.
    """
    lines: dict[int, str] = {}
    for box in sorted(boxes):
        lines.setdefault(box.image, f"Image-{box.image + 1}: ")
        steps = answer_format.steps(resized[box.image] if resized else None)
        lines[box.image] += write_box(to_steps(box, sizes[box.image], steps), answer_format)
    answer = "\n".join(lines.values()) or NO_TARGET
    return answer if thinking is None else f"<think>{thinking}</think><answer>{answer}</answer>"


def write_box(values: Sequence[int], answer_format: AnswerFormat) -> str:
    """One box, x1 y1 x2 y2 in steps, as an answer has it."""
    if answer_format.coordinates == "locations":
        text = "".join(f"<loc_{v}>" for v in values)
    else:
        text = "({},{}),({},{})".format(*values)
    return f"{BOX_START}{text}{BOX_END}" if answer_format.marks else text


def read_answer(
    text: str,
    sizes: Sequence[Size],
    answer_format: AnswerFormat,
    resized: Sequence[Size] | None = None,
    unnamed: int | None = None,
    score: Callable[[Sequence[Span]], float] | None = None,
) -> Answer:
    """A model's text, with each image's (width, height), as boxes in original pixels.

    Never raises: what cannot be read is left out and named in `problem`. An answer to one picture need not number it;
    to several it must, since a box in the wrong picture is worse than none; `unnamed` is the picture (from 0) that one
    which names none is about, where that is known. `resized`: each image's (width, height) as the model sees it, which
    answers in pixels need. A box's label is the name that the model wrote for it, if it did, and its score what `score`
    makes of the spans of characters that say it.
    """
    thinking, body, start, problem = _split_thinking(text)
    if answer_format.coordinates == "pixels" and resized is None:
        return Answer((), thinking, problem or "the resized pictures' sizes are not known, so pixels have no meaning")
    boxes: list[Box] = []
    image = 0 if len(sizes) == 1 else unnamed
    label: str | None = None
    for piece in scan(body):
        fault: str | None = None
        match piece:
            case NamedImage(image):
                pass
            case NamedObject(label):
                pass
            case BrokenBox(fault):
                pass
            case WrittenBox():
                box, fault = _read_box(piece, image, sizes, answer_format, resized)
                if box:
                    spans = [(start + first, start + last) for first, last in piece.spans]
                    boxes.append(replace(box, label=piece.label or label, score=score(spans) if score else None))
        problem = problem or fault
    if not boxes and problem is None and not _says_none(body.strip(), answer_format):
        problem = "no box and no 'None' in the answer"
    return Answer(tuple(sorted(boxes)), thinking, problem)


def _split_thinking(text: str) -> tuple[str, str, int, str | None]:
    """(reasoning, answer, where it starts, problem) of a text that may wrap them in <think> and <answer>."""
    for token in ("<|im_end|>", "<|endoftext|>"):
        text = text.split(token)[0]
    thinking = re.search(r"<think>(.*?)(</think>|$)", text, re.DOTALL)
    body = re.search(r"<answer>(.*?)(</answer>|$)", text, re.DOTALL)
    if thinking and not thinking[2]:
        return thinking[1].strip(), "", len(text), "the reasoning was not finished"
    reasoning = thinking[1].strip() if thinking else ""
    if body:
        return reasoning, body[1], body.start(1), None if body[2] else "the answer was not closed"
    start = thinking.end() if thinking else 0
    return reasoning, text[start:], start, None


def _read_box(
    written: WrittenBox,
    image: int | None,
    sizes: Sequence[Size],
    answer_format: AnswerFormat,
    resized: Sequence[Size] | None,
) -> tuple[Box | None, str | None]:
    """The box in original pixels, or why it is none; `image` is the picture that was named before it."""
    kind, values = written.kind, written.values
    image = image if written.image is None else written.image
    if kind == "locations" and answer_format.coordinates != "locations":
        return None, "the answer has location tokens, which this model does not use"
    if kind == "json" and answer_format.coordinates not in IN_JSON:
        return None, "the answer has a bbox_2d, whose pixels this model does not use"
    if image is None:
        return None, "a box names none of the pictures"
    if not 0 <= image < len(sizes):
        return None, f"image {image + 1} was named, of {len(sizes)}"
    steps = answer_format.steps(resized[image] if resized else None)
    if kind == "digits" and answer_format.coordinates == "locations":
        steps = RELATIVE_STEPS
    if any(type(v) is float for v in values) and max(values) <= 1:
        return None, "the answer has shares of a picture's size, which this model does not use"
    limits = (*steps, *steps)
    drifted = DRIFT if kind != "locations" else 0
    past = [(v, most) for v, most in zip(values, limits, strict=True) if not 0 <= v <= most]
    if far := [(v, most) for v, most in past if not -drifted * most <= v <= (1 + drifted) * most]:
        return None, _past(*max(far))
    inside = [min(max(v, 0), most) for v, most in zip(values, limits, strict=True)]
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        return None, "a box has no width or no height"
    return from_steps(image, inside, sizes[image], steps), f"{_past(*max(past))} and was clipped" if past else None


def _past(value: float, most: int) -> str:
    return f"a coordinate of {value} is past {most}" if value > 0 else f"a coordinate of {value} is below 0"


def _says_none(body: str, answer_format: AnswerFormat) -> bool:
    empty = answer_format.coordinates in IN_JSON and _EMPTY_LIST.fullmatch(body)
    return body.lower() == NO_TARGET.lower() or bool(empty)
