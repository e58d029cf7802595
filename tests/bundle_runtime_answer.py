"""The words' part of bundle_runtime.py: what may come in an answer, and its boxes; by BUNDLE.md alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

Steps = tuple[int, int]
PIECES = re.compile(r"Image-(\d+): |\((\d+),(\d+)\),\((\d+),(\d+)\)|" + r"<loc_(\d+)>" * 4 + r"|\{")
CORNER = r"\(\s*(\d+)\s*,\s*(\d+)\s*\)"
SHOWN = re.compile(rf"<\|box_start\|>\s*{CORNER}\s*,\s*{CORNER}\s*<\|box_end\|>")


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def most_steps(answer: dict[str, Any], seen: tuple[int, int]) -> Steps:
    """X and Y of a picture."""
    match answer["coordinates"]:
        case "digits" | "json":
            return 1000, 1000
        case "pixels":
            return seen
    return answer["locations"] - 1, answer["locations"] - 1


def show(question: str, answer: dict[str, Any], seen: Sequence[tuple[int, int]]) -> str:
    """The question with the boxes in it as an answer would have them."""
    if answer["coordinates"] in ("digits", "json") or not SHOWN.search(question):
        return question
    if answer["coordinates"] == "pixels" and len(set(seen)) > 1:
        raise ValueError("a box may lie in pictures of several sizes")
    steps = most_steps(answer, seen[0])

    def write(found: re.Match[str]) -> str:
        numbers = [min(most, round(int(v) * most / 1000)) for v, most in zip(found.groups(), steps * 2, strict=True)]
        words = "({},{}),({},{})" if answer["coordinates"] == "pixels" else "<loc_{}>" * 4
        return f"<|box_start|>{words.format(*numbers)}<|box_end|>"

    return SHOWN.sub(write, question)


class Grammar:
    """What may come after some tokens: the answer is parsed from its start, in every way that is left."""

    def __init__(self, tokenizer: Tokenizer, manifest: dict[str, Any], steps: Sequence[Steps]) -> None:
        self.digits = manifest["answer"]["coordinates"] != "locations"
        pieces = ["(", ",", "),(", ",", ")"] if self.digits else [""] * 5
        start, end = ("<|box_start|>", "<|box_end|>") if manifest["answer"].get("marks", True) else ("", "")
        pieces = [f"{start}{pieces[0]}", *pieces[1:4], f"{pieces[4]}{end}"]
        names = range(10) if self.digits else [f"<loc_{k}>" for k in range(manifest["answer"]["locations"])]
        self.pieces = [tokens_of(tokenizer, piece) for piece in pieces]
        self.numbers = [tokens_of(tokenizer, str(name))[0] for name in names]
        self.none = tokens_of(tokenizer, "None")
        self.heads = [
            [tokens_of(tokenizer, f"{line}Image-{n + 1}: ") for n in range(len(steps))] for line in ("", "\n")
        ]
        self.steps, self.stops = steps, manifest["model"]["eos_token_ids"]
        self.named, self.vocab = manifest["answer"]["unnamed"] == "refuse", manifest["model"]["vocab_size"]

    def legal(self, written: Sequence[int]) -> set[int]:
        """The ids that may come after these."""
        self.written, self.found = written, set[int]()
        if not self.named:
            self.anything(0)
            return self.found
        for stop in self.stops:
            list(self.literal([*self.none, stop], 0))
        for n, head in enumerate(self.heads[0]):
            for at in self.literal(head, 0):
                self.boxes(n, at)
        return self.found

    def anything(self, at: int) -> None:
        """All but in a box that was opened."""
        opened = [k for k in range(at, len(self.written)) if self.written[k] == self.pieces[0][0]]
        if not opened or len(set(self.steps)) > 1:
            self.found |= set(range(self.vocab))
            return
        across, down = self.steps[0]
        further = 1.08 if self.digits else 1
        for end in self.box(across, down, opened[0], int(further * across), int(further * down)):
            self.anything(end)

    def boxes(self, n: int, at: int) -> None:
        """Those of one line, and the lines after it."""
        for end in self.box(*self.steps[n], at, *self.steps[n]):
            self.boxes(n, end)
            for m in range(n + 1, len(self.steps)):
                for start in self.literal(self.heads[1][m], end):
                    self.boxes(m, start)
            for stop in self.stops:
                list(self.literal([stop], end))

    def box(self, across: int, down: int, at: int, right: int, lower: int) -> Iterator[int]:
        """Where a box ends that starts here; its second corner may lie so far out."""
        for a in self.literal(self.pieces[0], at):
            for x1, b in self.number(0, across - 1, self.pieces[1], a):
                for y1, c in self.number(0, down - 1, self.pieces[2], b):
                    for _, d in self.number(x1 + 1, right, self.pieces[3], c):
                        for _, end in self.number(y1 + 1, lower, self.pieces[4], d):
                            yield end

    def literal(self, piece: Sequence[int], at: int) -> Iterator[int]:
        """Where a piece ends that starts here, if it does; what is missing of it is legal."""
        for k, token in enumerate(piece):
            if at + k == len(self.written):
                self.found.add(token)
                return
            if self.written[at + k] != token:
                return
        yield at + len(piece)

    def number(self, low: int, high: int, after: Sequence[int], at: int) -> Iterator[tuple[int, int]]:
        """Each number within both bounds that may be meant here, and where what comes after it ends."""
        candidates = [[k] for k in range(low, high + 1)]
        if self.digits:
            candidates = [[int(digit) for digit in str(k)] for k in range(low, high + 1)]
        for value, candidate in enumerate(candidates, low):
            for end in self.literal([self.numbers[k] for k in candidate], at):
                for there in self.literal(after, end):
                    yield value, there


def to_boxes(
    text: str, sizes: Sequence[tuple[int, int]], steps: Sequence[Steps], answer: dict[str, Any]
) -> Iterator[tuple[float, ...]]:
    """(picture, x1, y1, x2, y2) in pixels of the originals, of an answer that may have been cut."""
    named = 0 if len(sizes) == 1 else None
    at = 0
    while found := PIECES.search(text, at):
        at, image = found.end(), named
        numbers: Sequence[float] = [int(value) for value in found.groups() if value]
        if len(numbers) == 1:
            named = int(numbers[0]) - 1
            continue
        if not numbers:
            if (read := read_object(text, found.start())) is None:
                continue
            said, at = read
            number = said.get("image_id", said.get("image"))
            numbers = said.get("bbox_2d", ()) if answer["coordinates"] in ("pixels", "json") else ()
            image = named if number is None else number - 1
        if image is None or not 0 <= image < len(sizes) or len(numbers) != 4:
            continue
        if any(isinstance(v, float) for v in numbers) and max(numbers) <= 1:
            continue
        bounds = steps[image] * 2
        if not all(-0.08 * most <= v <= 1.08 * most for v, most in zip(numbers, bounds, strict=True)):
            continue
        x1, y1, x2, y2 = (min(max(v, 0), most) for v, most in zip(numbers, bounds, strict=True))
        (width, height), (across, down) = sizes[image], steps[image]
        if x1 < x2 and y1 < y2:
            yield image, x1 * width / across, y1 * height / down, x2 * width / across, y2 * height / down


def read_object(text: str, at: int) -> tuple[dict[str, Any], int] | None:
    """A JSON object, and where it ends; None of one that was cut, or that only holds such objects."""
    try:
        said, length = json.JSONDecoder().raw_decode(text[at : at + 2000])
    except ValueError:
        return None
    inside = "bbox_2d" not in said and '"bbox_2d"' in text[at : at + length]
    return None if inside else (said, at + length)
