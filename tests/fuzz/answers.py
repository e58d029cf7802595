"""A model's text: boxes inside the pictures, finite, sorted, or none with a reason; never an exception."""

from __future__ import annotations

import math

from gemvg_edge.answer import AnswerFormat, read_answer

_LOCATIONS = AnswerFormat("locations", 101), AnswerFormat("locations", 101, marks=False)
_FORMATS = (AnswerFormat(), *_LOCATIONS, AnswerFormat("pixels"), AnswerFormat("json"))
_SIZES, _RESIZED = ((100, 50), (640, 480), (1, 1)), ((200, 150), (364, 448), (28, 28))


def seeds() -> list[bytes]:
    """Answers of every kind that is read."""
    box = "<|box_start|>(100,200),(300,400)<|box_end|>"
    texts = (
        f"Image-1: {box}{box}\nImage-2: {box}",
        "Image-2: <|box_start|><loc_1><loc_2><loc_30><loc_40><|box_end|>",
        "Image-1: <loc_1><loc_2><loc_30><loc_40><loc_5><loc_6><loc_7><loc_8>\nImage-2: <loc_1><loc_2><loc_3>",
        f"<think>Both show it.</think><answer>Image-2: {box}</answer><|im_end|>",
        f"It's in the third image. {box}",
        "in the 2th image (100,200),(300,400) and [1, 2, 3, 4] or (1.5,2.5, 30.25,40.75)",
        '```json\n[\n\t{"bbox_2d": [10, 30, 100, 60], "label": "mug"},\n\t{"bbox_2d": [1.5, 2, 3, 4], "image": 2}]',
        "<|object_ref_start|>the red car<|object_ref_end|>" + box,
        "[19,300,154,476]",
        "None",
        "[]",
        '{"objects": [{"bbox_2d": [10, 30, 100, 60]}], "count": [1, 2, 3, 4]}',
    )
    return [text.encode() for text in texts]


def check(data: bytes) -> None:
    """In every format, about one to three pictures."""
    text = data.decode(errors="replace")
    for answer_format in _FORMATS:
        for count in (1, 2, 3):
            sizes, resized = _SIZES[:count], _RESIZED[:count]
            answer = read_answer(text, sizes, answer_format, resized)
            assert list(answer.boxes) == sorted(answer.boxes)
            for box in answer.boxes:
                assert 0 <= box.image < count
                width, height = sizes[box.image]
                assert all(map(math.isfinite, (box.x1, box.y1, box.x2, box.y2)))
                assert 0 <= box.x1 < box.x2 <= width
                assert 0 <= box.y1 < box.y2 <= height
            assert answer.problem is None or answer.problem.strip()
