"""The grammar of answers by table, one labelled case a line, and by random boxes and texts."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemvg_edge.answer import AnswerFormat, read_answer, write_answer
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError

DIGITS = AnswerFormat()
LOCATIONS = AnswerFormat("locations", 101)
BARE = AnswerFormat("locations", 101, marks=False)
PIXELS = AnswerFormat("pixels")
IN_JSON = AnswerFormat("json")
FORMATS = {"digits": DIGITS, "locations": LOCATIONS, "bare": BARE, "pixels": PIXELS, "json": IN_JSON}
ONE = [(1000, 1000)]
TWO = [(1000, 1000), (200, 100)]  # the second is smaller, so a box in the wrong picture shows
ELEVEN = [(1000, 1000)] * 11
A, B = Box(0, 100, 200, 300, 400), Box(1, 20, 20, 60, 40)  # B is (100,200),(300,400) in the second picture
A_TEXT = "<|box_start|>(100,200),(300,400)<|box_end|>"
A_BARE = "<loc_10><loc_20><loc_30><loc_40>"
A_LOCATIONS = f"<|box_start|>{A_BARE}<|box_end|>"

GOOD = [
    # label, text, sizes, format, boxes
    ("digits, one picture", f"Image-1: {A_TEXT}", ONE, DIGITS, [A]),
    ("digits, the second of two", f"Image-2: {A_TEXT}", TWO, DIGITS, [B]),
    ("digits, both pictures", f"Image-1: {A_TEXT}\nImage-2: {A_TEXT}", TWO, DIGITS, [A, B]),
    ("two boxes in one picture", f"Image-1: {A_TEXT}<|box_start|>(0,0),(9,9)<|box_end|>", ONE, DIGITS,
     [Box(0, 0, 0, 9, 9), A]),
    ("the later picture first", f"Image-2: {A_TEXT}\nImage-1: {A_TEXT}", TWO, DIGITS, [A, B]),
    ("the same picture named twice", f"Image-1: {A_TEXT}\nImage-1: {A_TEXT}", ONE, DIGITS, [A, A]),
    ("the whole picture", "Image-1: <|box_start|>(0,0),(1000,1000)<|box_end|>", ONE, DIGITS,
     [Box(0, 0, 0, 1000, 1000)]),
    ("locations", f"Image-1: {A_LOCATIONS}", ONE, LOCATIONS, [A]),
    ("locations, both pictures", f"Image-1: {A_LOCATIONS}\nImage-2: {A_LOCATIONS}", TWO, LOCATIONS, [A, B]),
    ("locations without box tokens", "Image-1: <loc_10><loc_20><loc_30><loc_40>", ONE, LOCATIONS, [A]),
    ("without marks, both pictures", f"Image-1: {A_BARE}\nImage-2: {A_BARE}", TWO, BARE, [A, B]),
    ("without marks, two boxes", f"Image-1: <loc_0><loc_0><loc_1><loc_1>{A_BARE}", ONE, BARE,
     [Box(0, 0, 0, 10, 10), A]),
    ("without marks, with reasoning", f"<think>{A_BARE}</think><answer>Image-2: {A_BARE}</answer>", TWO, BARE, [B]),
    ("marks from a model without them", f"Image-1: {A_LOCATIONS}{A_LOCATIONS}", ONE, BARE, [A, A]),
    ("digits from a model of locations", f"Image-1: {A_TEXT}", ONE, LOCATIONS, [A]),
    ("Qwen3-VL's JSON", '[{"bbox_2d": [100, 200, 300, 400], "label": "mug"}]', ONE, IN_JSON, [A]),
    ("Qwen3-VL's JSON, fenced, two boxes",
     '```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "mug"},\n\t{"bbox_2d": [0, 0, 9, 9]}\n]\n```',
     ONE, IN_JSON, [Box(0, 0, 0, 9, 9), A]),
    ("Qwen3-VL's JSON that names a picture", '[{"bbox_2d": [100, 200, 300, 400], "image": 2}]', TWO, IN_JSON, [B]),
    ("Qwen3-VL's empty list", "```json\n[]\n```", TWO, IN_JSON, []),
    ("digits from a model of JSON", f"Image-2: {A_TEXT}", TWO, IN_JSON, [B]),
    ("None", "None", TWO, DIGITS, []),
    ("None, in another case and with space", " none\n", TWO, DIGITS, []),
    ("None and the end of the turn", "None<|im_end|>", TWO, DIGITS, []),
    ("the end of the turn", f"Image-2: {A_TEXT}<|im_end|>", TWO, DIGITS, [B]),
    ("text after the end of the turn is not the answer's", f"Image-2: {A_TEXT}<|im_end|>Image-1: {A_TEXT}", TWO, DIGITS,
     [B]),
    ("the end of the text", f"Image-2: {A_TEXT}<|endoftext|>", TWO, DIGITS, [B]),
    ("one picture needs no number", A_TEXT, ONE, DIGITS, [A]),
    ("Qwen2-VL with its special tokens", f"<|object_ref_start|>the red car<|object_ref_end|>{A_TEXT}<|im_end|>", ONE,
     DIGITS, [A]),
    ("Qwen2-VL with special tokens skipped", "the red car(100,200),(300,400)", ONE, DIGITS, [A]),
    ("Migician's sentence", f"It's in the second image. {A_TEXT}", TWO, DIGITS, [B]),
    ("Migician's sentence, special tokens skipped", "It's in the first image. (100,200),(300,400)", TWO, DIGITS, [A]),
    ("Migician's sentence, capitals", f"The Second Image. {A_TEXT}", TWO, DIGITS, [B]),
    ("MIG-Bench's ordinals", f"in the 2th image {A_TEXT} and the 1th image {A_TEXT}", TWO, DIGITS, [A, B]),
    ("image with a space", f"image 2: {A_TEXT}", TWO, DIGITS, [B]),
    ("a number of two digits", f"Image-11: {A_TEXT}", ELEVEN, DIGITS, [Box(10, 100, 200, 300, 400)]),
    ("UniVG-R1", "<think>It is the left one.</think>\n<answer>(100,200),(300,400)</answer>", ONE, DIGITS, [A]),
    ("ours with reasoning", f"<think>Both show it.</think><answer>Image-2: {A_TEXT}</answer>", TWO, DIGITS, [B]),
    ("reasoning and no answer tag", f"<think>Both show it.</think>Image-2: {A_TEXT}", TWO, DIGITS, [B]),
    ("a box in the reasoning is not an answer", f"<think>Image-1: {A_TEXT}?</think><answer>Image-2: {A_TEXT}</answer>",
     TWO, DIGITS, [B]),
    ("a picture named in the reasoning only", f"<think>Image-1?</think><answer>Image-2: {A_TEXT}</answer>", TWO, DIGITS,
     [B]),
    ("reasoning that ends in None", "<think>Nothing is red.</think><answer>None</answer>", TWO, DIGITS, []),
    ("spaces inside a box", "Image-1: <|box_start|>( 100 , 200 ), ( 300,400 )<|box_end|>", ONE, DIGITS, [A]),
    ("a space after the box token", "Image-1: <|box_start|> (100,200),(300,400) <|box_end|>", ONE, DIGITS, [A]),
    ("four numbers in brackets", "It is at [100, 200, 300, 400].", ONE, DIGITS, [A]),
    ("four numbers in parentheses", "The mug: (100,200, 300,400)", ONE, DIGITS, [A]),
    ("brackets of a picture", "In the second image: [100, 200, 300, 400]", TWO, DIGITS, [B]),
    ("a list of lists", "[[100, 200, 300, 400]]", ONE, DIGITS, [A]),
    ("fractions of a step", "(100.5,200.25),(300.75,400)", ONE, DIGITS, [Box(0, 100.5, 200.25, 300.75, 400)]),
    ("fractions in brackets", "[100.0, 200.0, 300.0, 400.0]", ONE, DIGITS, [A]),
    ("one step wide", "Image-1: <|box_start|>(1,1),(2,2)<|box_end|>", ONE, DIGITS, [Box(0, 1, 1, 2, 2)]),
]  # fmt: skip

BAD = [
    # label, text, sizes, format, boxes that are still read, part of the problem
    ("nothing", "", TWO, DIGITS, [], "no box and no 'None'"),
    ("garbage", "I am sorry, I cannot help with that.", TWO, DIGITS, [], "no box and no 'None'"),
    ("an explanation around None", "None of them is red", TWO, DIGITS, [], "no box and no 'None'"),
    ("a picture and no box", "Image-1: ", TWO, DIGITS, [], "no box and no 'None'"),
    ("no number with several pictures", A_TEXT, TWO, DIGITS, [], "names none of the pictures"),
    ("a number only for the second box", f"{A_TEXT}\nImage-2: {A_TEXT}", TWO, DIGITS, [B],
     "names none of the pictures"),
    ("a picture that was not given", f"Image-3: {A_TEXT}", TWO, DIGITS, [], "image 3 was named, of 2"),
    ("one good picture and one that was not given", f"Image-1: {A_TEXT}\nImage-3: {A_TEXT}", TWO, DIGITS, [A],
     "image 3 was named, of 2"),
    ("picture 0", f"Image-0: {A_TEXT}", TWO, DIGITS, [], "image 0 was named, of 2"),
    ("picture 0 of one", f"Image-0: {A_TEXT}", ONE, DIGITS, [], "image 0 was named, of 1"),
    ("picture 0th", f"the 0th image {A_TEXT}", TWO, DIGITS, [], "image 0 was named, of 2"),
    ("a picture number without end", f"Image-{'1' * 5000}: {A_TEXT}", TWO, DIGITS, [], "was named, of 2"),
    ("an ordinal past the pictures", f"It's in the tenth image. {A_TEXT}", TWO, DIGITS, [], "image 10 was named, of 2"),
    ("a step past the frame", "Image-1: <|box_start|>(1,2),(3,1001)<|box_end|>", ONE, DIGITS, [Box(0, 1, 2, 3, 1000)],
     "a coordinate of 1001 is past 1000 and was clipped"),
    ("far past the frame", "Image-1: <|box_start|>(1,2),(3,1081)<|box_end|>", ONE, DIGITS, [],
     "a coordinate of 1081 is past 1000"),
    ("nothing left inside", "Image-1: <|box_start|>(1001,2),(1030,4)<|box_end|>", ONE, DIGITS, [], "no width or no"),
    ("a coordinate without end", f"Image-1: <|box_start|>(1,2),(3,{'9' * 5000})<|box_end|>", ONE, DIGITS, [], ""),
    ("a location past the vocabulary", "Image-1: <loc_10><loc_20><loc_30><loc_101>", ONE, LOCATIONS, [], "past 100"),
    ("a step below 0", "Image-1: <|box_start|>(-1,2),(3,4)<|box_end|>", ONE, DIGITS, [Box(0, 0, 2, 3, 4)],
     "a coordinate of -1 is below 0 and was clipped"),
    ("far below 0", "Image-1: <|box_start|>(-81,2),(3,4)<|box_end|>", ONE, DIGITS, [], "of -81 is below 0"),
    ("shares", "Image-1: <|box_start|>(0.1,0.2),(0.3,0.4)<|box_end|>", ONE, DIGITS, [], "shares of a picture's size"),
    ("shares in brackets", "It is at [0.1, 0.2, 0.3, 0.4].", ONE, DIGITS, [], "shares of a picture's size"),
    ("three numbers in brackets", "It is at [100, 200, 300].", ONE, DIGITS, [], "no box and no 'None'"),
    ("five numbers in brackets", "It is at [100, 200, 300, 400, 500].", ONE, DIGITS, [], "no box and no 'None'"),
    ("numbers with exponents", "It is at [1e2, 2e2, 3e2, 4e2].", ONE, DIGITS, [], "no box and no 'None'"),
    ("no numbers in brackets", "It is at [NaN, 200, Infinity, 400].", ONE, DIGITS, [], "no box and no 'None'"),
    ("another kind of JSON", '[{"bbox": [100, 200, 300, 400]}]', ONE, DIGITS, [], "no box and no 'None'"),
    ("brackets, two pictures", "It is at [100, 200, 300, 400].", TWO, DIGITS, [], "names none of the pictures"),
    ("inverted", "Image-1: <|box_start|>(300,400),(100,200)<|box_end|>", ONE, DIGITS, [], "no width or no height"),
    ("no width", "Image-1: <|box_start|>(100,200),(100,400)<|box_end|>", ONE, DIGITS, [], "no width or no height"),
    ("no height", "Image-1: <|box_start|>(100,200),(300,200)<|box_end|>", ONE, DIGITS, [], "no width or no height"),
    ("cut after the box token", "Image-1: <|box_start|>", ONE, DIGITS, [], "not finished"),
    ("cut inside the digits", "Image-1: <|box_start|>(100,200),(300,40", ONE, DIGITS, [], "not finished"),
    ("cut inside the second box", f"Image-1: {A_TEXT}<|box_start|>(1,2),(3", ONE, DIGITS, [A], "not finished"),
    ("cut inside the locations", "Image-1: <|box_start|><loc_10><loc_20>", ONE, LOCATIONS, [], "not finished"),
    ("three locations", "Image-1: <|box_start|><loc_1><loc_2><loc_3><|box_end|>", ONE, LOCATIONS, [], "not finished"),
    ("five locations", "Image-1: <|box_start|><loc_10><loc_20><loc_30><loc_40><loc_9><|box_end|>", ONE, LOCATIONS, [A],
     "fewer than four locations"),
    ("three without marks", "Image-1: <loc_1><loc_2><loc_3>", ONE, BARE, [], "fewer than four locations"),
    ("three without marks, then a line", f"Image-1: <loc_1><loc_2><loc_3>\nImage-2: {A_BARE}", TWO, BARE, [B],
     "fewer than four locations"),
    ("five without marks", f"Image-1: {A_BARE}<loc_9>", ONE, BARE, [A], "fewer than four locations"),
    ("cut inside the second without marks", f"Image-1: {A_BARE}<loc_1><loc_2><loc_3><loc", ONE, BARE, [A],
     "fewer than four locations"),
    ("without marks, a space inside", "Image-1: <loc_1><loc_2> <loc_3><loc_4>", ONE, BARE, [], "fewer than four"),
    ("without marks, no picture named", A_BARE, TWO, BARE, [], "names none of the pictures"),
    ("without marks, from a model of digits", f"Image-1: {A_BARE}", ONE, DIGITS, [], "location tokens"),
    ("one corner", "Image-1: <|box_start|>(100,200)<|box_end|>", ONE, DIGITS, [], "not finished"),
    ("the box of Qwen2.5-VL", '{"bbox_2d": [100, 200, 300, 400]}', ONE, DIGITS, [], "has a bbox_2d, whose pixels"),
    ("the box of Qwen2.5-VL, locations", '{"bbox_2d": [1, 2, 3, 4]}', ONE, LOCATIONS, [], "has a bbox_2d, whose pix"),
    ("a box of Qwen2.5-VL beside ours", f'Image-1: {A_TEXT}{{"bbox_2d": [1, 2, 3, 4]}}', ONE, DIGITS, [A],
     "has a bbox_2d, whose pixels"),
    ("locations from a model of digits", f"Image-1: {A_LOCATIONS}", ONE, DIGITS, [], "location tokens"),
    ("reasoning cut short", f"<think>Image-1: {A_TEXT} looks", TWO, DIGITS, [], "reasoning was not finished"),
    ("answer cut short", f"<think>Left.</think><answer>Image-1: {A_TEXT}", TWO, DIGITS, [A], "answer was not closed"),
    ("Arabic digits", "Image-1: <|box_start|>(\u0661,\u0662),(\u0663,\u0664)<|box_end|>", ONE, DIGITS, [],
     "not finished"),
    ("letters that only look like an ordinal", f"the f\u0131r\u017ft image {A_TEXT}", TWO, DIGITS, [],
     "none of the pictures"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sizes", "answer_format", "boxes"), [case[1:] for case in GOOD], ids=[case[0] for case in GOOD]
)
def test_reads(text: str, sizes: list[tuple[int, int]], answer_format: AnswerFormat, boxes: list[Box]) -> None:
    answer = read_answer(text, sizes, answer_format)
    assert list(answer.boxes) == boxes
    assert answer.problem is None


@pytest.mark.parametrize(
    ("text", "sizes", "answer_format", "boxes", "problem"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_says_what_is_wrong(
    text: str, sizes: list[tuple[int, int]], answer_format: AnswerFormat, boxes: list[Box], problem: str
) -> None:
    answer = read_answer(text, sizes, answer_format)
    assert list(answer.boxes) == boxes
    assert answer.problem is not None
    assert problem in answer.problem


# In pixels: 100 x 50 and 200 x 300 originals, which the model sees twice as wide and three times as high.
PICTURES, RESIZED = [(100, 50), (200, 300)], [(200, 150), (400, 900)]
PIXEL_A, PIXEL_B = Box(0, 5, 10, 50, 20), Box(1, 5, 10, 50, 20)  # both (10,30),(100,60)
PIXEL_TEXT, BBOX = "<|box_start|>(10,30),(100,60)<|box_end|>", '"bbox_2d": [10, 30, 100, 60]'
OTHER = '"bbox_2d": [0, 0, 2, 3]'  # one pixel of an original

IN_PIXELS = [
    # label, text, how many pictures, boxes
    ("ours", f"Image-1: {PIXEL_TEXT}\nImage-2: {PIXEL_TEXT}", 2, [PIXEL_A, PIXEL_B]),
    ("ours, past 0..1000 of the first and inside the second", "Image-2: (0,0),(400,900)", 2, [Box(1, 0, 0, 200, 300)]),
    ("Qwen2.5-VL's own", f'```json\n[\n\t{{{BBOX}, "label": "mug"}}\n]\n```', 1, [PIXEL_A]),
    ("two of its boxes", f'```json\n[{{{BBOX}, "label": "a"}},\n{{{OTHER}, "label": "b"}}]\n```', 1,
     [Box(0, 0, 0, 1, 1), PIXEL_A]),
    ("fractions of a pixel", '{"bbox_2d": [10.0, 30.0, 100.0, 60.0]}', 1, [PIXEL_A]),
    ("brackets", "It is at [10, 30, 100, 60].", 1, [PIXEL_A]),
    ("a single object, the label first", f'{{"label": "mug", {BBOX}}}', 1, [PIXEL_A]),
    ("cut after a whole object", f'```json\n[{{{BBOX}}},', 1, [PIXEL_A]),
    ("inside other objects", f'{{"objects": [{{{BBOX}}}]}}', 1, [PIXEL_A]),
    ("the image's number after the box", f'[{{{BBOX}, "image_id": 2}}]', 2, [PIXEL_B]),
    ("the image's number before the box", f'[{{"image": 2, {BBOX}}}, {{"image": 1, {BBOX}}}]', 2, [PIXEL_A, PIXEL_B]),
    ("the image named before the object", f'Image-2: {{{BBOX}}}', 2, [PIXEL_B]),
    ("an object's own number is for itself", f'Image-2: {{"image": 1, {BBOX}}}, {{{BBOX}}}', 2, [PIXEL_A, PIXEL_B]),
    ("a label that names a picture says nothing", f'Image-1: {{{BBOX}, "label": "as in image 2"}}, {{{OTHER}}}', 2,
     [Box(0, 0, 0, 1, 1), PIXEL_A]),
    ("a label with braces", f'{{{BBOX}, "label": "{{a}}"}}', 1, [PIXEL_A]),
    ("with reasoning", f'<think>{{{OTHER}}}</think><answer>[{{{BBOX}}}]</answer>', 1, [PIXEL_A]),
    ("None", "None", 2, []),
    ("an empty list", "```json\n[]\n```", 2, []),
    ("an empty list alone", "[]", 1, []),
]  # fmt: skip
NOT_IN_PIXELS = [
    # label, text, how many pictures, boxes that are still read, part of the problem
    ("x past the resized picture", 'Image-1: (10,30),(201,60)', 2, [Box(0, 5, 10, 100, 20)], "201 is past 200 and was"),
    ("x far past it", 'Image-1: (10,30),(217,60)', 2, [], "a coordinate of 217 is past 200"),
    ("y past the resized picture", 'Image-1: (10,30),(100,151)', 2, [Box(0, 5, 10, 50, 50)], "151 is past 150 and was"),
    ("y past it in JSON", '{"bbox_2d": [10, 30, 100, 159]}', 1, [Box(0, 5, 10, 50, 50)], "159 is past 150 and was cli"),
    ("y far past it in JSON", '{"bbox_2d": [10, 30, 100, 163]}', 1, [], "a coordinate of 163 is past 150"),
    ("below 0", '{"bbox_2d": [-1, 30, 100, 60]}', 1, [Box(0, 0, 10, 50, 20)], "-1 is below 0 and was clipped"),
    ("the relative frame", '{"bbox_2d": [0.1, 0.2, 0.5, 0.6]}', 1, [], "shares of a picture's size"),
    ("infinity in JSON", '{"bbox_2d": [10, 30, Infinity, 60]}', 1, [], "not four numbers"),
    ("no number in JSON", '{"bbox_2d": [10, NaN, 100, 60]}', 1, [], "not four numbers"),
    ("a number past every range", '{"bbox_2d": [10, 30, 1e999, 60]}', 1, [], "not four numbers"),
    ("three numbers", '{"bbox_2d": [1, 2, 3]}', 1, [], "not four numbers"),
    ("truth values", '{"bbox_2d": [false, 2, 30, 40]}', 1, [], "not four numbers"),
    ("no list", '{"bbox_2d": "1, 2, 3, 4"}', 1, [], "not four numbers"),
    ("a list of lists", '{"bbox_2d": [[1, 2, 3, 4]]}', 1, [], "not four numbers"),
    ("inverted", '{"bbox_2d": [100, 60, 10, 30]}', 1, [], "no width or no height"),
    ("no picture named", f'[{{{BBOX}}}]', 2, [], "names none of the pictures"),
    ("a picture that was not given", f'{{{BBOX}, "image_id": 3}}', 2, [], "image 3 was named, of 2"),
    ("another picture than the only one", f'{{{BBOX}, "image_id": 2}}', 1, [], "image 2 was named, of 1"),
    ("picture 0", f'{{{BBOX}, "image_id": 0}}', 2, [], "image 0 was named, of 2"),
    ("a picture's file", f'{{{BBOX}, "image": "left.png"}}', 2, [], "by something else than a number"),
    ("cut inside an object", f'[{{{BBOX}}}, {{"bbox_2d": [10, 30', 1, [PIXEL_A], "not finished"),
    ("cut after the box's name", '[{"bbox_2d"', 1, [], "not finished"),
    ("not quite JSON", "{'label': 'a', \"bbox_2d\": [10, 30, 100, 60]}", 1, [], "not finished"),
    ("digits without end", '{"bbox_2d": [1, 2, 3, ' + "9" * 5000 + "]}", 1, [], "not finished"),
    ("braces without end", "{" * 5000, 1, [], "no box and no 'None'"),
    ("nested without end", '{"a":' * 5000 + BBOX, 1, [], "not finished"),
    ("location tokens", f"Image-1: {A_LOCATIONS}", 2, [], "location tokens"),
    ("a point", '[{"point_2d": [10, 30], "label": "mug"}]', 1, [], "no box and no 'None'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "pictures", "boxes"), [case[1:] for case in IN_PIXELS], ids=[c[0] for c in IN_PIXELS])
def test_reads_pixels(text: str, pictures: int, boxes: list[Box]) -> None:
    answer = read_answer(text, PICTURES[:pictures], PIXELS, RESIZED[:pictures])
    assert list(answer.boxes) == boxes
    assert answer.problem is None


@pytest.mark.parametrize(
    ("text", "pictures", "boxes", "problem"), [case[1:] for case in NOT_IN_PIXELS], ids=[c[0] for c in NOT_IN_PIXELS]
)
def test_says_what_is_wrong_in_pixels(text: str, pictures: int, boxes: list[Box], problem: str) -> None:
    answer = read_answer(text, PICTURES[:pictures], PIXELS, RESIZED[:pictures])
    assert list(answer.boxes) == boxes
    assert answer.problem is not None
    assert problem in answer.problem


def test_pixels_need_the_resized_sizes() -> None:
    answer = read_answer(f"<think>Red.</think>{PIXEL_TEXT}", PICTURES[:1], PIXELS)
    assert (answer.boxes, answer.thinking) == ((), "Red.")
    assert answer.problem == "the resized pictures' sizes are not known, so pixels have no meaning"
    with pytest.raises(GemvgError, match="in pixels of the resized pictures; give their sizes"):
        write_answer([PIXEL_A], PICTURES, PIXELS)
    assert write_answer([], PICTURES, PIXELS) == "None"


def test_frames() -> None:
    for relative in (DIGITS, LOCATIONS, IN_JSON):
        assert relative.coordinate_frame == {"kind": "relative", "size": 1000}
    assert PIXELS.coordinate_frame == {"kind": "absolute"}


def test_keeps_the_reasoning() -> None:
    text = f"<think>\nThe mug is red.\n</think>\n<answer>Image-2: {A_TEXT}</answer>"
    assert read_answer(text, TWO, DIGITS).thinking == "The mug is red."
    assert read_answer("<think>cut", TWO, DIGITS).thinking == "cut"
    assert read_answer(A_TEXT, ONE, DIGITS).thinking == ""


WRITTEN = [
    ("no box", [], DIGITS, "None"),
    ("no box, locations", [], LOCATIONS, "None"),
    ("digits", [B], DIGITS, f"Image-2: {A_TEXT}"),
    ("locations", [B], LOCATIONS, f"Image-2: {A_LOCATIONS}"),
    ("without marks", [B, A, A], BARE, f"Image-1: {A_BARE}{A_BARE}\nImage-2: {A_BARE}"),
    ("sorted by picture", [B, A], DIGITS, f"Image-1: {A_TEXT}\nImage-2: {A_TEXT}"),
    ("sorted by left edge, one line a picture", [A, Box(0, 0, 500, 9, 509)], DIGITS,
     f"Image-1: <|box_start|>(0,500),(9,509)<|box_end|>{A_TEXT}"),
    ("clamped to the picture", [Box(1, -5, -5, 300, 300)], DIGITS,
     "Image-2: <|box_start|>(0,0),(1000,1000)<|box_end|>"),
    ("JSON's digits", [B], IN_JSON, f"Image-2: {A_TEXT}"),
    ("pixels", [B], PIXELS, "Image-2: <|box_start|>(10,40),(30,80)<|box_end|>"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("boxes", "answer_format", "text"), [case[1:] for case in WRITTEN], ids=[case[0] for case in WRITTEN]
)
def test_writes(boxes: list[Box], answer_format: AnswerFormat, text: str) -> None:
    assert write_answer(boxes, TWO, answer_format, resized=[(140, 140), (100, 200)]) == text


formats = st.sampled_from([DIGITS, LOCATIONS, BARE, AnswerFormat("locations", 1025), PIXELS, IN_JSON])
picture_sizes = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=12)
resized_sides = st.integers(1, 40).map(lambda cells: cells * 28)


@given(st.data(), formats, picture_sizes)
def test_what_is_written_is_read_within_half_a_step(
    data: st.DataObject, answer_format: AnswerFormat, sizes: list[tuple[int, int]]
) -> None:
    shares = st.floats(0, 1)
    resized = [data.draw(st.tuples(resized_sides, resized_sides)) for _ in sizes]
    boxes = []
    for _ in range(data.draw(st.integers(0, 8))):
        image = data.draw(st.integers(0, len(sizes) - 1))
        # Two steps are enough for a box to keep a width whatever the rounding.
        width, height = (data.draw(st.floats(2 / steps, 1)) for steps in answer_format.steps(resized[image]))
        left, top = data.draw(shares) * (1 - width), data.draw(shares) * (1 - height)
        w, h = sizes[image]
        boxes.append(Box(image, left * w, top * h, (left + width) * w, (top + height) * h))
    text = write_answer(boxes, sizes, answer_format, resized=resized)
    answer = read_answer(text, sizes, answer_format, resized)
    assert answer.problem is None
    assert len(answer.boxes) == len(boxes)
    # Boxes that differ by less than a step may come back in the other order, so each looks for its own.
    for box in boxes:
        steps = answer_format.steps(resized[box.image])
        across, down = (side / most * 0.5 + 1e-6 for side, most in zip(sizes[box.image], steps, strict=True))
        assert any(
            read.image == box.image
            and max(abs(read.x1 - box.x1), abs(read.x2 - box.x2)) <= across
            and max(abs(read.y1 - box.y1), abs(read.y2 - box.y2)) <= down
            for read in answer.boxes
        )


ANSWER_PIECES = (
    *"<>(),-. \n0123456789", "Image-", "image ", "first image", "th image", "<|box_start|>", "<|box_end|>", "<loc_",
    "1001", '{"bbox_2d": [', "]", "}", '"image": ', "<think>", "</think>", "<answer>", "</answer>", "<|im_end|>",
    "None",
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(st.sampled_from(ANSWER_PIECES)).map("".join)), formats, picture_sizes)
@example("Image-0: ", DIGITS, [(1, 1)])
@example("Image-" + "9" * 5000, DIGITS, [(1, 1)])
@example("(" + "9" * 5000 + ",1),(1,1)", DIGITS, [(1, 1)])
@example("f\u0131fth image", DIGITS, [(1, 1)])
def test_reading_never_raises_and_boxes_lie_in_the_pictures(
    text: str, answer_format: AnswerFormat, sizes: list[tuple[int, int]]
) -> None:
    answer = read_answer(text, sizes, answer_format, [(28 * k, 56) for k in range(1, len(sizes) + 1)])
    for box in answer.boxes:
        width, height = sizes[box.image]
        assert 0 <= box.x1 < box.x2 <= width
        assert 0 <= box.y1 < box.y2 <= height


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"coordinates": "words"}, "'words'"),
        ({"coordinates": "locations"}, "location tokens need at least 2"),
        ({"coordinates": "locations", "locations": 1}, "is 1"),
        ({"marks": False}, "marks is false, which only answers in locations"),
        ({"coordinates": "locations", "locations": 9, "marks": False, "unnamed": "each"}, "marks is false, which only"),
    ],
)
def test_refuses_a_wrong_format(config: dict[str, Any], message: str) -> None:
    with pytest.raises(GemvgError, match=message):
        AnswerFormat.from_config(config)


@pytest.mark.parametrize("answer_format", FORMATS.values(), ids=FORMATS)
def test_format_survives_its_config(answer_format: AnswerFormat) -> None:
    assert AnswerFormat.from_config(answer_format.to_config()) == answer_format
    assert ("marks" in answer_format.to_config()) == (answer_format == BARE), "readers of old do not know the field"


def test_reasoning_is_written_before_the_answer_and_read_back() -> None:
    boxes = (Box(1, 10, 20, 60, 100),)
    text = write_answer(boxes, [(100, 200), (100, 200)], AnswerFormat(), thinking="Image-1: a mug.")
    assert text == (
        "<think>Image-1: a mug.</think><answer>Image-2: <|box_start|>(100,100),(600,500)<|box_end|></answer>"
    )
    answer = read_answer(text, [(100, 200), (100, 200)], AnswerFormat())
    assert answer.boxes == boxes
    assert answer.thinking == "Image-1: a mug."
    assert answer.problem is None


HOSTILE = {
    "braces": "{", "braces and quotes": '{"', "nested objects": '{"a":', "boxes never closed": '{"bbox_2d":[',
    "lists": "[", "parentheses": "(", "corners": "(1,1)", "commas": "(1,1),", "numbers": "[1,", "quotes": '"',
    "thinking": "<think>", "answers": "<answer>", "box tokens": "<|box_start|>", "names": "image-",
    "numbers of names": "1th ", "digits": "9", "spaces after a corner": "(1,1)" + " " * 20, "dots": "1.",
    "locations": "<loc_1>", "threes of locations": "<loc_1><loc_2><loc_3> ",
    "whole boxes": '{"bbox_2d":[1,2,3,4]}', "escapes": '{"\\\\',
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("answer_format", FORMATS.values(), ids=FORMATS)
def test_a_long_text_takes_no_longer_than_its_length(case: str, answer_format: AnswerFormat) -> None:
    """300,000 characters in a second on a slow machine; a quadratic reader took 45."""
    text = HOSTILE[case] * (300_000 // len(HOSTILE[case]))
    started = time.process_time()
    read_answer(text + "}", PICTURES[:1], answer_format, RESIZED[:1])
    assert time.process_time() - started < 4


def test_a_quadrilateral_is_no_box() -> None:
    """Its first two corners are a sliver."""
    text = "<|quad_start|>(100,200),(300,210),(290,400),(95,390)<|quad_end|>"
    answer = read_answer(text, [(1000, 1000)], AnswerFormat())
    assert answer.boxes == ()
    assert answer.problem == "a quadrilateral is no box"
