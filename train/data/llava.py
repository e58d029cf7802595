"""An instruction set in LLaVA's JSON, of one picture or several -> one record a question and its answer.

    FOLDER/*.json    [{"id", "image": "coco/train2017/1.jpg" or [.., ..] (or "images": [..], as MGrounding writes it),
        "conversations": [{"from": "human", "value": "<image>\\nWhat ..?"}, {"from": "gpt", "value": ".."}]}]
    FOLDER/coco/train2017/1.jpg    the pictures, as the files name them

Format: github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md; several pictures as LLaVA-NeXT-Interleave has them.
What it maps to (ours):

    an answer in words                                                     understanding
    one with boxes as Qwen2-VL and MGrounding write them, 0..1000 each     referential

    <|box_start|>(x1,y1),(x2,y2)<|box_end|>

Of a conversation each turn is a record of its own, with the pictures shown so far and without the earlier words. Boxes
in four decimals are refused: some sets count them in the picture, others in its padded square, and nothing says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemvg_edge.answer_pieces import BOX_START
from gemvg_edge.errors import GemvgError
from train.data.annotations import MALFORMED, find_files, inside
from train.data.json_list import stream_files
from train.data.mgrounding import NOT_IN_TURN, place_images, read_boxes, read_turns
from train.data.pictures import Size, measure_all
from train.data.record import Fault, Record

LAYOUT = "lay the folder out as *.json, each a list of conversations, beside the pictures that they name"
NAME = "LLaVA"
_DECIMAL = r"\s*[01]?\.\d+\s*"
_OTHER_BOX = re.compile(rf"[\[(]{','.join([_DECIMAL] * 4)}[\])]|<box>|<bbox>")


def read_llava(folder: Path) -> Iterator[Record | Fault]:
    """Every question of every conversation, in the order of the files."""
    files = find_files(folder, "*.json")
    if not files:
        raise GemvgError(f"{folder}: no .json files there; {LAYOUT}")
    for content, where in stream_files(files, LAYOUT):
        yield from _read_conversation(content, folder, where)


def _read_conversation(content: Any, folder: Path, where: str) -> Iterator[Record | Fault]:
    try:
        names = content.get("image", content.get("images"))
        turns = read_turns(content["conversations"])
        paths = tuple(inside(folder, name) for name in ([names] if isinstance(names, str) else names or ()))
    except MALFORMED as error:
        yield Fault(where, f"not laid out as LLaVA ({type(error).__name__})")
        return
    if not paths:
        yield Fault(where, "a conversation without pictures")
        return
    if not turns:
        yield Fault(where, NOT_IN_TURN)
        return
    shown = [text.count("<image>") for text in turns]
    if sum(shown) != len(paths) or any(shown[1::2]):
        yield Fault(where, "not one <image> a picture, in a question")
        return
    sizes = measure_all(paths)
    if isinstance(sizes, Fault):
        yield sizes
        return
    texts = place_images(turns)
    for turn in range(0, len(texts), 2):
        seen = sum(shown[: turn + 1])
        yield _read_turn(texts[turn], texts[turn + 1], paths[:seen], sizes[:seen], where)


def _read_turn(
    question: str, answer: str, paths: tuple[Path, ...], sizes: tuple[Size, ...], where: str
) -> Record | Fault:
    if not paths:
        return Fault(where, "a question before the first picture")
    if _OTHER_BOX.search(question) or _OTHER_BOX.search(answer):
        return Fault(where, "a box in numbers that do not say of what")
    if BOX_START not in answer:
        return Record(paths, sizes, question, (), "understanding", NAME, words=answer)
    boxes, problem = read_boxes(question, answer, sizes)
    return Fault(where, problem) if problem else Record(paths, sizes, question, boxes, "referential", NAME)
