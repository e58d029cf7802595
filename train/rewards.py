"""Rewards of GRPO: pure functions of a text and the true boxes, each 0..1.

GeM-VG's own formulas are not known beyond "a rule-based reward from several dimensions, including format"; each
function names its source, or says "ours". A pair of boxes is worth its IoU through MG-Thinker's soft band (nothing up
to 0.1, all from 0.9 on), and a pair across pictures nothing at all. Every term counts only boxes that are worth
something, so a wrong box (worth nothing with every true box) can lower a reward and never raise it. Knows neither
models nor TRL; grpo.py calls it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from gemvg_edge.answer import Answer, AnswerFormat, read_answer, write_answer
from gemvg_edge.answer_pieces import BOX_END
from gemvg_edge.boxes import Box, Size, iou
from train.data.record import Mode

BAND = (0.1, 0.9)  # MG-Thinker's
_TAGS = re.compile(r"</?(?:think|answer)>")
_COT = re.compile(r"\s*<think>(?P<thinking>.*)</think>\s*<answer>(?P<body>.*)</answer>\s*", re.DOTALL)
_WORDS, _BOXES = re.compile(r"[\w-]+"), re.compile(r"<\|box_start\|>.*?<\|box_end\|>|<loc_\d+>")
_BOX = re.compile(rf"(?:<loc_\d+>){{4}}|.+?(?:{re.escape(BOX_END)}|$)")  # the first without marks
_END = re.compile(r"<\|im_end\|>(?:<\|endoftext\|>)*$")


@dataclass(frozen=True)
class RewardWeights:
    """What each term counts for; the total is divided by their sum, so the best text has 1."""

    format: float = 1.0  # UniVG-R1, MG-Thinker: a plain sum of format and boxes
    iou: float = 1.0  # the same two
    image: float = 1.0  # MG-Thinker adds R_id to R_IoU
    count: float = 0.5  # ours: the IoU term falls with a wrong count already
    thought: float = 0.0  # ours: of use only where true reasoning is known, as in the simulated world


@dataclass(frozen=True)
class Terms:
    """The rewards of one text."""

    format: float
    iou: float
    image: float
    count: float
    thought: float = 1.0

    def total(self, weights: RewardWeights) -> float:
        """Their weighted mean."""
        shares = astuple(weights)
        return math.fsum(w * term for w, term in zip(shares, astuple(self), strict=True)) / math.fsum(shares)


def total_reward(
    text: str,
    truth: Sequence[Box],
    sizes: Sequence[tuple[int, int]],
    answer_format: AnswerFormat,
    mode: Mode,
    weights: RewardWeights | None = None,
    *,
    finished: bool = True,
    resized: Sequence[Size] | None = None,
) -> float:
    """Weighted mean of the terms; `truth` in pixels, `sizes` (width, height) of each picture."""
    terms = score(text, truth, sizes, answer_format, mode, finished=finished, resized=resized)
    return terms.total(weights or RewardWeights())


def score(
    text: str,
    truth: Sequence[Box],
    sizes: Sequence[tuple[int, int]],
    answer_format: AnswerFormat,
    mode: Mode,
    *,
    finished: bool = True,
    resized: Sequence[Size] | None = None,
    reasoning: str = "",
) -> Terms:
    """The terms of a text; `finished` is false if it was cut off at the longest length, and then nothing is earned:
    an answer that never ends must not be worth as much as one that does.

    `resized`: (width, height) of each picture as the model sees it, for answers in pixels. `reasoning` is the true one,
    where it is known.
    """
    if not finished:
        return Terms(0.0, 0.0, 0.0, 0.0, 0.0)
    answer = read_answer(text, sizes, answer_format, resized)
    return Terms(
        format_reward(text, sizes, answer_format, mode, resized=resized),
        iou_reward(answer, truth),
        image_reward(answer, truth),
        count_reward(answer, truth),
        thought_reward(answer.thinking, reasoning) if mode == "cot" else 1.0,
    )


def format_reward(
    text: str,
    sizes: Sequence[Size],
    answer_format: AnswerFormat,
    mode: Mode,
    *,
    resized: Sequence[Size] | None = None,
) -> float:
    """1 if the text is what the mode asks for, else 0 (UniVG-R1's 1/0 for each mode; the grammar is ours).

    `cot`: `<think>..</think><answer>..</answer>` with something thought and nothing around them; `direct`: no such
    tags. In both the answer must be in answer.py's own grammar, with its boxes in any order.
    """
    answer = read_answer(text, sizes, answer_format, resized)
    if answer.problem:
        return 0.0
    body, written = _END.sub("", text), write_answer(answer.boxes, sizes, answer_format, resized=resized)
    tags = _TAGS.findall(body)
    if mode == "direct":
        return float(not tags and _is_written(body, written))
    found = _COT.fullmatch(body)
    if not found or len(tags) != 4 or not found["thinking"].strip():
        return 0.0
    return float(_is_written(found["body"], written))


def _is_written(body: str, written: str) -> bool:
    """Whether the text is how the boxes that were read in it are written, but for their order."""
    return _pieces(body.strip()) == _pieces(written)


def _pieces(body: str) -> list[tuple[str, str]]:
    """(image's name, box) of every box in the text, sorted."""
    lines = [line.partition(": ") for line in body.split("\n")]
    return sorted((name, box) for name, _, boxes in lines for box in _BOX.findall(boxes) or [""])


def iou_reward(answer: Answer, truth: Sequence[Box]) -> float:
    """Sum of the best one-to-one pairs' worth / max(boxes given, boxes wanted).

    The pairing is Hungarian and its denominator VisionReasoner's, the worth MG-Thinker's. None wanted: 1 for "None".
    """
    if not truth or not answer.boxes:
        return _both_none(answer, truth)
    worths = _worths(answer.boxes, truth)
    paired: list[float] = worths[linear_sum_assignment(worths, maximize=True)].tolist()
    return math.fsum(paired) / max(len(answer.boxes), len(truth))


def count_reward(answer: Answer, truth: Sequence[Box]) -> float:
    """2 x pairs worth something / (boxes given + boxes wanted), with as many pairs as there can be. Ours.

    The plain 1 - |given - wanted| / max(given, wanted) pays for boxes anywhere while too few are given. This one is 1
    only if the count is right and every box is near its own true one, and every wrong box lowers it.
    """
    if not truth or not answer.boxes:
        return _both_none(answer, truth)
    hits = _worths(answer.boxes, truth) > 0
    pairs = int(hits[linear_sum_assignment(hits, maximize=True)].sum())
    return 2 * pairs / (len(answer.boxes) + len(truth))


def image_reward(answer: Answer, truth: Sequence[Box]) -> float:
    """F1 of the set of pictures that are named; a picture is right if one of its boxes is worth something.

    In the spirit of MG-Thinker's R_id, which pairs targets by picture alone. The condition is ours: without it a wrong
    box in a right picture would pay.
    """
    if not truth or not answer.boxes:
        return _both_none(answer, truth)
    named = {box.image for box in answer.boxes}
    right = {box.image for box, worths in zip(answer.boxes, _worths(answer.boxes, truth), strict=True) if worths.any()}
    return 2 * len(right) / (len(named) + len({box.image for box in truth}))


def thought_reward(said: str, true: str) -> float:
    """F1 of the words of two reasonings, as often as each stands there (ROUGE-1's); boxes count in the other terms.

    1 where the true reasoning is not known: it then says nothing of any answer.
    """
    wanted = Counter(_WORDS.findall(_BOXES.sub(" ", true.lower())))
    if not wanted:
        return 1.0
    given = Counter(_WORDS.findall(_BOXES.sub(" ", said.lower())))
    return 2 * (wanted & given).total() / (wanted.total() + given.total())


def _both_none(answer: Answer, truth: Sequence[Box]) -> float:
    """1 if no box is wanted and the text says so; one that cannot be read says nothing."""
    return float(not truth and not answer.boxes and answer.problem is None)


def _worths(given: Sequence[Box], wanted: Sequence[Box]) -> npt.NDArray[np.float64]:
    """What each pair is worth, (given, wanted); 0 across pictures, since their IoU is 0."""
    overlaps = np.array([[iou(a, b) for b in wanted] for a in given])
    low, high = BAND
    banded: npt.NDArray[np.float64] = np.where(overlaps <= low, 0.0, np.where(overlaps >= high, 1.0, overlaps))
    return banded
