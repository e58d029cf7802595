"""The grammar of an answer over token ids: only what may come next competes, and what must come costs nothing.

A walk is a generator: it yields the ids that may come next, or None where any may, and is sent the one that came. Its
tokens are those that the tokenizer makes of what `answer.write_answer` writes, as training had them. Knows no logits.

A model whose answers are this project's can then write nothing unreadable; one that writes in its own words
(`answer.unnamed`) is held to the grammar inside the boxes that it opens, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from gemvg_edge.answer import DRIFT, NO_TARGET, AnswerFormat
from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.boxes import Size, Steps
from gemvg_edge.engines.protocol import Ids
from gemvg_edge.prompt import encode, token_id

Said = TypeVar("Said")
Part = Generator[Ids | None, int, Said]  # of a walk; returns what was written
Walk = Part[None]
Grammar = Callable[[bool], Walk]  # of an answer, with reasoning before it or without
REASONED, ANSWER, ANSWERED = "</think>", "<answer>", "</answer>"
_TAIL = 32  # tokens that are searched for the end of the reasoning; more than its letters


@dataclass(frozen=True)
class Words:
    """The token ids of what answers are made of."""

    heads: list[list[int]]  # "Image-1: " and so on, one a picture
    next_heads: list[list[int]]  # the same after a line break
    none: list[int]
    open: list[int]  # a box, up to its first number; nothing where boxes have no marks
    after: list[list[int]]  # what follows x1, y1, x2 and y2
    numbers: list[int]  # location tokens, or the digits
    by_digits: bool
    stops: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Tokenizer, answer_format: AnswerFormat, pictures: int, stops: Iterable[int]) -> Words | None:
        """Those of one tokenizer; None where it writes numbers otherwise than digit by digit, or lacks box tokens."""
        start, end = (BOX_START, BOX_END) if answer_format.marks else ("", "")
        by_digits = answer_format.coordinates != "locations"
        names = [str(k) for k in range(10)] if by_digits else [f"<loc_{k}>" for k in range(answer_format.locations)]
        before, *after = ["(", ",", "),(", ",", ")"] if by_digits else [""] * 5
        heads = [f"Image-{k + 1}: " for k in range(pictures)]
        words = Words(
            heads=[encode(tokenizer, head) for head in heads],
            next_heads=[encode(tokenizer, f"\n{head}") for head in heads],
            none=encode(tokenizer, NO_TARGET),
            open=encode(tokenizer, start + before),
            after=[encode(tokenizer, piece) for piece in (*after[:3], after[3] + end)],
            numbers=[encode(tokenizer, name)[0] if by_digits else token_id(tokenizer, name) for name in names],
            by_digits=by_digits,
            stops=tuple(stops),
        )
        if not answer_format.marks:  # locations alone, each of which is a token
            return words
        # Nothing can be known token by token where a tokenizer joins digits, or digits and commas.
        box = (120, 45, 1000, 678) if by_digits else (0, 0, 1, 1)
        sample = BOX_START + ("({},{}),({},{})".format(*box) if by_digits else "<loc_0><loc_0><loc_1><loc_1>") + BOX_END
        walk = _in_boxes(words, (1000, 1000) if by_digits else (1, 1), (1000, 1000))
        whole = tokenizer.token_to_id(BOX_START) is not None and accepts(walk, encode(tokenizer, sample))
        return words if whole else None


def answer_grammar(
    tokenizer: Tokenizer, answer_format: AnswerFormat, resized: Sequence[Size], stops: Iterable[int]
) -> Grammar:
    """What may come in an answer about pictures of these (width, height) as the model sees them.

    `stops` are the ids that end an answer. The reasoning of one that is asked for it is free.
    """
    words = Words.of(tokenizer, answer_format, len(resized), stops)
    steps = [answer_format.steps(size) for size in resized]
    if words is None:
        return lambda think: free()
    if answer_format.unnamed != "refuse":
        # The picture that a box lies in decides how many pixels it has, and is known where all have as many.
        across, down = steps[0]
        drifted = int((1 + DRIFT) * across), int((1 + DRIFT) * down)
        return lambda think: _in_boxes(words, steps[0], drifted) if len(set(steps)) == 1 else free()
    return lambda think: _reasoned(tokenizer, words, steps) if think else _direct(words, steps)


def accepts(walk: Walk, ids: Sequence[int]) -> bool:
    """Whether a walk, which is used up, allows these tokens, one after the other."""
    legal = next(walk)
    for k, token in enumerate(ids):
        if legal is not None and token not in legal:
            return False
        try:
            legal = walk.send(token)
        except StopIteration:
            return k == len(ids) - 1
    return True


def free() -> Walk:
    """Any token, for ever."""
    while True:
        yield None


def _direct(words: Words, steps: Sequence[Steps]) -> Walk:
    nothing = [[*words.none, stop] for stop in words.stops]
    picture = yield from _either([*words.heads, *nothing])
    yield from _lines(words, steps, picture, [[stop] for stop in words.stops])


def _reasoned(tokenizer: Tokenizer, words: Words, steps: Sequence[Steps]) -> Walk:
    """Any tokens, until `</think>` is written; then an answer between its tags."""
    closing = encode(tokenizer, ANSWERED)
    beginnings = [f"Image-{k + 1}: " for k in range(len(steps))] + [f"{NO_TARGET}{ANSWERED}"]
    tail: list[int] = []
    options: list[list[int]] = []
    while not options:
        tail = [*tail[1 - _TAIL :], (yield None)]
        _, reasoned, after = tokenizer.decode(tail, skip_special_tokens=False).rpartition(REASONED)
        if reasoned and ANSWER.startswith(after):
            options = [_rest(tokenizer, beginning, after) for beginning in beginnings]
            options = options if all(options) else []
    nothing = options.pop()
    picture = yield from _either([*options, *([*nothing, stop] for stop in words.stops)])
    yield from _lines(words, steps, picture, [[*closing, stop] for stop in words.stops])


def _rest(tokenizer: Tokenizer, beginning: str, written: str) -> list[int]:
    """The tokens of an answer's beginning in its tags that follow what is `written` of them; none if one spans it."""
    ids = encode(tokenizer, f"{REASONED}{ANSWER}{beginning}")
    for k in range(len(ids)):
        if tokenizer.decode(ids[:k], skip_special_tokens=False) == REASONED + written:
            return ids[k:]
    return encode(tokenizer, beginning) if written == ANSWER else []


def _in_boxes(words: Words, steps: Steps, most: Steps) -> Walk:
    """Any tokens, but in a box that was opened numbers up to the `most` that are read, over the edge at its `steps`."""
    while True:
        if (yield None) == words.open[0]:
            yield from _literal(words.open[1:])
            yield from _corners(words, steps, most)


def _lines(words: Words, steps: Sequence[Steps], picture: int, ends: Sequence[Sequence[int]]) -> Walk:
    """The rest of an answer, from the head of a picture's line on; a `picture` past the last was no picture."""
    opened = False
    x1: int | None = None  # where boxes have no marks, another one starts with its first number
    while picture < len(steps):
        if not opened:
            yield from _literal(words.open)
        yield from _corners(words, steps[picture], steps[picture], x1)
        # The same line, a later picture's, or the end.
        boxes = [words.open] if words.open else [[number] for number in words.numbers[: steps[picture][0]]]
        chosen = yield from _either([*boxes, *words.next_heads[picture + 1 :], *ends])
        opened = chosen < len(boxes)
        x1 = chosen if opened and not words.open else None
        picture += 0 if opened else chosen - len(boxes) + 1


def _corners(words: Words, steps: Steps, most: Steps, x1: int | None = None) -> Walk:
    """Four numbers with x1 < x2 and y1 < y2, and what follows each; the first may be there already."""
    if x1 is None:
        x1 = yield from _number(words, 0, steps[0] - 1, words.after[0])
    y1 = yield from _number(words, 0, steps[1] - 1, words.after[1])
    yield from _number(words, x1 + 1, most[0], words.after[2])
    yield from _number(words, y1 + 1, most[1], words.after[3])


def _number(words: Words, low: int, high: int, after: list[int]) -> Part[int]:
    """A whole number within both bounds, without leading zeros, and the tokens `after` it."""
    if not words.by_digits:
        value = words.numbers.index((yield _legal(words.numbers[low : high + 1])))
        yield from _literal(after)
        return value
    value, written = 0, False
    while True:
        digits = range(10) if value or not written else ()
        following = {words.numbers[d]: 10 * value + d for d in digits if _begins(10 * value + d, low, high)}
        done = written and low <= value <= high
        token = yield _legal([*following, *after[:1]] if done else following)
        if token not in following:
            yield from _literal(after[1:])
            return value
        value, written = following[token], True


def _begins(prefix: int, low: int, high: int) -> bool:
    """Whether a number within both bounds starts with the digits of another, or is that."""
    first = last = prefix
    while first <= high:
        if last >= low:
            return True
        if not prefix:
            return False
        first, last = 10 * first, 10 * last + 9
    return False


def _literal(ids: Sequence[int]) -> Walk:
    for token in ids:
        yield _legal([token])


def _either(options: Sequence[Sequence[int]]) -> Part[int]:
    """One of several token sequences, none of which begins another -> which."""
    left, done = list(range(len(options))), 0
    while True:
        token = yield _legal(options[k][done] for k in left)
        left, done = [k for k in left if options[k][done] == token], done + 1
        if len(options[left[0]]) == done:
            return left[0]


def _legal(ids: Iterable[int]) -> Ids:
    """Each once and ascending: of equal logits the first is then the one that the whole vocabulary would have given."""
    return np.array(sorted(set(ids)), np.int64)
