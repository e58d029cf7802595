"""Rewards: a table of labelled texts, malformed ones included, and what no text may change."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemvg_edge.answer import AnswerFormat, read_answer, write_answer
from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.boxes import Box, iou
from train.data.record import MODES, Mode
from train.rewards import RewardWeights, Terms, score, total_reward

DIGITS, LOCATIONS = AnswerFormat(), AnswerFormat("locations", 101)
BARE = AnswerFormat("locations", 101, marks=False)
SIZES = ((1000, 1000), (500, 2000), (1000, 1000))  # of three pictures; the first and last are 1 pixel a step
A = Box(0, 100, 100, 300, 300)
A2 = Box(0, 600, 600, 800, 900)
B = Box(1, 50, 200, 150, 600)  # 100..300 x 100..300 in steps
C = Box(2, 400, 400, 900, 900)


def say(*corners: int) -> str:
    return "{}({},{}),({},{}){}".format(BOX_START, *corners, BOX_END)


SAY_A, SAY_A2, SAY_B, SAY_C = say(100, 100, 300, 300), say(600, 600, 800, 900), say(100, 100, 300, 300), say(400, 400, 900, 900)  # noqa: E501  # fmt: skip
SAY_BOTH = f"Image-1: {SAY_A}\nImage-2: {SAY_B}"
HALF_A = say(100, 100, 200, 300)  # IoU 0.5
NEARLY_A = say(100, 100, 300, 290)  # IoU 0.95
TOUCHES_A = say(100, 100, 115, 300)  # IoU 0.075
FAR = say(0, 900, 50, 1000)


def cot(answer: str) -> str:
    return f"<think>It is red.</think><answer>{answer}</answer>"


# label, mode, true boxes, text, then the rewards of format, IoU, image and count
CASES: list[tuple[str, Mode, tuple[Box, ...], str, tuple[float, float, float, float]]] = [
    ("right", "direct", (A,), f"Image-1: {SAY_A}", (1, 1, 1, 1)),
    ("right, with reasoning", "cot", (A,), cot(f"Image-1: {SAY_A}"), (1, 1, 1, 1)),
    ("right, with the end of the turn", "direct", (A,), f"Image-1: {SAY_A}<|im_end|>", (1, 1, 1, 1)),
    ("right, ended twice", "cot", (A,), cot(f"Image-1: {SAY_A}") + "<|im_end|><|endoftext|>", (1, 1, 1, 1)),
    ("two pictures", "direct", (A, B), SAY_BOTH, (1, 1, 1, 1)),
    ("two pictures, in the other order", "direct", (A, B), f"Image-2: {SAY_B}\nImage-1: {SAY_A}", (1, 1, 1, 1)),
    ("two in a picture", "direct", (A, A2), f"Image-1: {SAY_A}{SAY_A2}", (1, 1, 1, 1)),
    ("two in a picture, in the other order", "direct", (A, A2), f"Image-1: {SAY_A2}{SAY_A}", (1, 1, 1, 1)),
    ("the picture named twice", "direct", (A, A2), f"Image-1: {SAY_A}\nImage-1: {SAY_A2}", (1, 1, 1, 1)),
    ("none, rightly", "direct", (), "None", (1, 1, 1, 1)),
    ("none, rightly, with reasoning", "cot", (), cot("None"), (1, 1, 1, 1)),
    ("lines in the reasoning", "cot", (), "<think>a\nb</think>\n<answer>\nNone</answer>\n", (1, 1, 1, 1)),
    ("none, wrongly", "direct", (A,), "None", (1, 0, 0, 0)),
    ("a box where none is wanted", "direct", (), f"Image-1: {SAY_A}", (1, 0, 0, 0)),
    ("half a box", "direct", (A,), f"Image-1: {HALF_A}", (1, 0.5, 1, 1)),
    ("above the band", "direct", (A,), f"Image-1: {NEARLY_A}", (1, 1, 1, 1)),
    ("below the band", "direct", (A,), f"Image-1: {TOUCHES_A}", (1, 0, 0, 0)),
    ("beside it", "direct", (A,), f"Image-1: {FAR}", (1, 0, 0, 0)),
    ("the right place in the wrong picture", "direct", (A,), f"Image-2: {SAY_A}", (1, 0, 0, 0)),
    ("pictures exchanged", "direct", (A, C), f"Image-1: {SAY_C}\nImage-3: {SAY_A}", (1, 0, 0, 0)),
    ("one of two", "direct", (A, B), f"Image-1: {SAY_A}", (1, 0.5, 2 / 3, 2 / 3)),
    ("one of two in a picture", "direct", (A, A2), f"Image-1: {SAY_A}", (1, 0.5, 1, 2 / 3)),
    ("one of three", "direct", (A, B, C), f"Image-1: {SAY_A}", (1, 1 / 3, 0.5, 0.5)),
    ("one right and one beside", "direct", (A,), f"Image-1: {SAY_A}{FAR}", (1, 0.5, 1, 2 / 3)),
    ("one right and one elsewhere", "direct", (A,), f"Image-1: {SAY_A}\nImage-2: {FAR}", (1, 0.5, 2 / 3, 2 / 3)),
    ("the same box twice", "direct", (A,), f"Image-1: {SAY_A}{SAY_A}", (1, 0.5, 1, 2 / 3)),
    ("the same box twice for two", "direct", (A, B), f"Image-1: {SAY_A}{SAY_A}", (1, 0.5, 2 / 3, 0.5)),
    ("two right, one half", "direct", (A, B, C), SAY_BOTH + f"\nImage-3: {say(400, 400, 650, 900)}", (1, 2.5 / 3, 1, 1)),  # noqa: E501
    ("the better of two counts", "direct", (A,), f"Image-1: {HALF_A}{NEARLY_A}", (1, 0.5, 1, 2 / 3)),
    ("reasoning that was not asked for", "direct", (A,), cot(f"Image-1: {SAY_A}"), (0, 1, 1, 1)),
    ("reasoning left out", "cot", (A,), f"Image-1: {SAY_A}", (0, 1, 1, 1)),
    ("empty reasoning", "cot", (A,), f"<think> </think><answer>Image-1: {SAY_A}</answer>", (0, 1, 1, 1)),
    ("words before the reasoning", "cot", (A,), "Well. " + cot(f"Image-1: {SAY_A}"), (0, 1, 1, 1)),
    ("words after the answer", "cot", (A,), cot(f"Image-1: {SAY_A}") + " Done.", (0, 1, 1, 1)),
    ("words between the two", "cot", (), "<think>a</think> so <answer>None</answer>", (0, 1, 1, 1)),
    ("answered twice", "cot", (), cot("None") + "<answer>None</answer>", (0, 1, 1, 1)),
    ("thought twice", "cot", (), "<think>a</think>" + cot("None"), (0, 1, 1, 1)),
    ("an answer without reasoning", "cot", (), "<answer>None</answer>", (0, 1, 1, 1)),
    ("reasoning that never ends", "cot", (A,), f"<think>Image-1: {SAY_A}", (0, 0, 0, 0)),
    ("an answer that never ends", "cot", (A,), f"<think>a</think><answer>Image-1: {SAY_A}", (0, 1, 1, 1)),
    ("the box in the reasoning only", "cot", (A,), f"<think>Image-1: {SAY_A}</think><answer>None</answer>", (1, 0, 0, 0)),  # noqa: E501
    ("nothing", "direct", (A,), "", (0, 0, 0, 0)),
    ("nothing where none is wanted", "direct", (), "", (0, 0, 0, 0)),
    ("only the end of the turn", "direct", (), "<|im_end|>", (0, 0, 0, 0)),
    ("prose", "direct", (), "There is no such thing.", (0, 0, 0, 0)),
    ("an empty answer", "cot", (), cot(""), (0, 0, 0, 0)),
    ("a picture too many where none is wanted", "direct", (), f"Image-4: {SAY_A}", (0, 0, 0, 0)),
    ("a picture too many", "direct", (A,), f"Image-1: {SAY_A}\nImage-4: {SAY_A}", (0, 1, 1, 1)),
    ("no picture named", "direct", (A,), SAY_A, (0, 0, 0, 0)),
    ("cut off in a box", "direct", (A,), f"Image-1: {SAY_A}{BOX_START}(10,", (0, 1, 1, 1)),
    ("cut off at once", "direct", (A,), f"Image-1: {BOX_START}", (0, 0, 0, 0)),
    ("corners exchanged", "direct", (A,), f"Image-1: {say(300, 300, 100, 100)}", (0, 0, 0, 0)),
    ("a box without an area", "direct", (A,), f"Image-1: {say(100, 100, 100, 300)}", (0, 0, 0, 0)),
    ("a coordinate past 1000", "direct", (A,), f"Image-1: {say(100, 100, 300, 1300)}", (0, 0, 0, 0)),
    ("a number without end", "direct", (A,), f"Image-1: {BOX_START}({'9' * 5000},", (0, 0, 0, 0)),
    ("Migician's words", "direct", (A,), f"It's in the first image. {SAY_A}", (0, 1, 1, 1)),
    ("no box tokens", "direct", (A,), "Image-1: (100,100),(300,300)", (0, 1, 1, 1)),
    ("spaces in a box", "direct", (A,), f"Image-1: {BOX_START}(100, 100), (300, 300){BOX_END}", (0, 1, 1, 1)),
    ("prose around the answer", "direct", (A,), f"Here: Image-1: {SAY_A} I think.", (0, 1, 1, 1)),
    ("location tokens of another model", "direct", (A,), "Image-1: <loc_1><loc_1><loc_3><loc_3>", (0, 0, 0, 0)),
    ("lone surrogates and zeros", "direct", (A,), "\ud800\x00", (0, 0, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "truth", "text", "wanted"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_table(mode: Mode, truth: tuple[Box, ...], text: str, wanted: tuple[float, float, float, float]) -> None:
    terms = score(text, truth, SIZES, DIGITS, mode)
    assert (terms.format, terms.iou, terms.image, terms.count) == pytest.approx(wanted)
    assert total_reward(text, truth, SIZES, DIGITS, mode) == pytest.approx(
        (wanted[0] + wanted[1] + wanted[2] + wanted[3] / 2) / 3.5
    )


def test_location_tokens() -> None:
    text = f"Image-1: {BOX_START}<loc_10><loc_10><loc_30><loc_30>{BOX_END}"
    assert score(text, [A], SIZES, LOCATIONS, "direct") == Terms(1, 1, 1, 1)
    assert score(f"Image-1: {SAY_A}", [A], SIZES, LOCATIONS, "direct") == Terms(0, 1, 1, 1)  # readable, not its grammar


BARE_A, BARE_A2 = "<loc_10><loc_10><loc_30><loc_30>", "<loc_60><loc_60><loc_80><loc_90>"
WITHOUT_MARKS = {  # text about A and A2 -> the rewards of format and count
    "right": (f"Image-1: {BARE_A}{BARE_A2}", 1, 1),
    "in the other order": (f"Image-1: {BARE_A2}{BARE_A}", 1, 1),
    "the picture named twice": (f"Image-1: {BARE_A2}\nImage-1: {BARE_A}", 1, 1),
    "one of two": (f"Image-1: {BARE_A}", 1, 2 / 3),
    "with marks": (f"Image-1: {BOX_START}{BARE_A}{BOX_END}{BOX_START}{BARE_A2}{BOX_END}", 0, 1),
    "a location more": (f"Image-1: {BARE_A}{BARE_A2}<loc_9>", 0, 1),
    "a location less": (f"Image-1: {BARE_A}<loc_60><loc_60><loc_80>", 0, 2 / 3),
    "a space between": (f"Image-1: {BARE_A} {BARE_A2}", 0, 1),
}


@pytest.mark.parametrize("label", WITHOUT_MARKS)
def test_location_tokens_without_marks(label: str) -> None:
    text, form, count = WITHOUT_MARKS[label]
    terms = score(text, [A, A2], SIZES, BARE, "direct")
    assert (terms.format, terms.count) == pytest.approx((form, count))


def test_a_text_that_was_cut_off_earns_nothing() -> None:
    assert score(SAY_BOTH, [A, B], SIZES, DIGITS, "direct", finished=False) == Terms(0, 0, 0, 0, 0)


def test_what_is_thought_earns_by_its_words() -> None:
    """In any order; boxes count in the other terms, and where the true reasoning is not known, words say nothing."""

    def thought(said: str, true: str, mode: Mode = "cot") -> float:
        text = f"<think>{said}</think><answer>Image-1: {SAY_A}</answer>"
        return score(text, [A], SIZES, DIGITS, mode, reasoning=true).thought

    true = f"Image-1: red mug, blue ball. Found: Image-1 {SAY_A} red mug."
    assert thought(true, true) == 1
    assert thought(true.replace(SAY_A, SAY_B), true) == 1
    assert thought(true.replace("blue", "green"), true) == pytest.approx(8 / 9)
    assert thought("nothing", true) == 0
    assert thought("nothing", "") == thought("nothing", true, "direct") == 1
    heavy = RewardWeights(thought=2.0)
    assert total_reward(f"Image-1: {SAY_A}", [A], SIZES, DIGITS, "direct", heavy) == 1


def test_pairs_are_the_best_as_a_whole() -> None:
    """Taking the best pair first would leave the other box with nothing."""
    left, right = Box(0, 0, 0, 100, 100), Box(0, 50, 0, 150, 100)
    text = f"Image-1: {say(20, 0, 120, 100)}{say(0, 0, 60, 100)}"
    middle, sliver = Box(0, 20, 0, 120, 100), Box(0, 0, 0, 60, 100)
    assert iou(middle, left) > iou(sliver, left) > iou(middle, right) > 0.1 > iou(sliver, right)
    terms = score(text, [left, right], SIZES, DIGITS, "direct")
    assert terms.iou == pytest.approx((iou(sliver, left) + iou(middle, right)) / 2)
    assert terms.count == 1


def test_weights() -> None:
    assert [field.name for field in fields(RewardWeights)] == [field.name for field in fields(Terms)]
    assert Terms(1, 0, 0, 0).total(RewardWeights(3, 1, 0, 0)) == 0.75
    assert Terms(0, 1, 0.5, 0).total(RewardWeights(1, 1, 2, 0)) == 0.5


def boxes(most: int = 5) -> st.SearchStrategy[list[Box]]:
    """Boxes on whole steps of each picture, from a coarse grid so that they overlap often."""

    def box(image: int, x: int, y: int, width: int, height: int) -> Box:
        scale_x, scale_y = SIZES[image][0] / 20, SIZES[image][1] / 20
        return Box(image, x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y)

    corner, side = st.integers(0, 14), st.integers(1, 6)
    return st.lists(st.builds(box, st.integers(0, 2), corner, corner, side, side), max_size=most)


def written(given_boxes: list[Box], mode: Mode, order: random.Random | None = None) -> str:
    """The boxes as text, each in its own line if they are put in an order."""
    lines = [write_answer([box], SIZES, DIGITS) for box in given_boxes]
    if order:
        order.shuffle(lines)
    text = "\n".join(lines) or "None"
    return cot(text) if mode == "cot" else text


@given(boxes(), st.sampled_from(MODES))
def test_the_truth_has_all(truth: list[Box], mode: Mode) -> None:
    thinking = "so" if mode == "cot" else None
    assert total_reward(write_answer(truth, SIZES, DIGITS, thinking), truth, SIZES, DIGITS, mode) == pytest.approx(1)


@given(boxes(), boxes(), st.sampled_from(MODES), st.randoms(use_true_random=False))
def test_the_order_of_boxes_changes_nothing(
    said: list[Box], truth: list[Box], mode: Mode, order: random.Random
) -> None:
    before = score(written(said, mode), truth, SIZES, DIGITS, mode)
    shuffled = order.sample(truth, len(truth))
    after = score(written(said, mode, order), shuffled, SIZES, DIGITS, mode)
    assert (after.format, after.image, after.count) == (before.format, before.image, before.count)
    assert after.iou == pytest.approx(before.iou, abs=1e-12)


@given(boxes(), boxes(), boxes(3), st.sampled_from(MODES))
def test_a_wrong_box_never_raises_a_term(said: list[Box], truth: list[Box], more: list[Box], mode: Mode) -> None:
    wrong = [box for box in more if all(iou(box, true) <= 0.1 for true in truth)]
    before = score(written(said, mode), truth, SIZES, DIGITS, mode)
    after = score(written(said + wrong, mode), truth, SIZES, DIGITS, mode)
    assert after.format == before.format == 1
    assert after.iou <= before.iou + 1e-12
    assert after.image <= before.image
    assert after.count <= before.count
    if wrong and before.count:
        assert after.total(RewardWeights()) < before.total(RewardWeights())


@given(boxes(), boxes())
def test_the_wrong_picture_scores_as_no_match(said: list[Box], truth: list[Box]) -> None:
    """The same boxes, with every true one in a picture that no box was given for."""
    truth = [Box(1, true.x1 / 2, true.y1 * 2, true.x2 / 2, true.y2 * 2) for true in truth if true.image != 1]
    said = [box for box in said if box.image != 1]
    terms = score(written(said, "direct"), truth, SIZES, DIGITS, "direct")
    nothing = float(not said and not truth)
    assert terms == Terms(1, nothing, nothing, nothing)


@given(st.text(alphabet="<think>/answer Imge-12:()0,loc_|bx\n", max_size=60), boxes(2), st.sampled_from(MODES))
def test_any_text_has_a_reward_between_0_and_1(text: str, truth: list[Box], mode: Mode) -> None:
    terms = score(text, truth, SIZES, DIGITS, mode)
    assert all(0 <= term <= 1 for term in (terms.format, terms.iou, terms.image, terms.count))
    if read_answer(text, SIZES, DIGITS).problem:
        assert terms.format == 0
