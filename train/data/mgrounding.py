"""MGrounding-630k's conversations -> one record a question and its answer.

    FOLDER/MGrounding-630k.json (all), or FOLDER/<Subset>/*.json    [{"images": [..], "type", "conversations": [
        {"from": "human", "value": "<image>\\n<image>\\n.."}, {"from": "gpt", "value": "It's in the third image. .."}]}]
    FOLDER/<Subset>/..., or FOLDER/home/liyou/opensource_datasets/MGrounding-630k/<Subset>/..., as its archives unpack

Format: the README of Michael4933/Migician. Boxes are 0..1000 of each picture's own size; an answer names their picture,
or the question does. What its subsets map to (ours, after GeM-VG's kinds):

    Group_Grounding, Referring_Grounding, Region_Locating    referential
    Common_Object, Difference                                semantic
    Object_Tracking                                          temporal
    Free-Form                                                reasoning
    an answer without boxes, whatever the subset             understanding

Tracking frames out of order are its shuffled variant: there "the first image" is the first in time, and is replaced by
its place in the list; a record that names others by ordinals is refused. A later question of a conversation stands
alone here, without the earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gemvg_edge.answer import AnswerFormat, read_answer
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file
from train.data.annotations import MALFORMED, find_files, inside
from train.data.json_list import stream_files
from train.data.mig_bench import ORDINALS, asked_image
from train.data.pictures import Size, measure_all
from train.data.record import Fault, Kind, Record

LAYOUT = "download huggingface.co/datasets/Michael4933/MGrounding-630k and unpack its archives (with 7z) in the folder"
NAME = "MGrounding-630k"
UNPACKED = Path("home/liyou/opensource_datasets") / NAME
KIND_OF_SUBSET: dict[str, Kind] = {
    "Group_Grounding": "referential",
    "Referring_Grounding": "referential",
    "Region_Locating": "referential",
    "Common_Object": "semantic",
    "Difference": "semantic",
    "Object_Tracking": "temporal",
    "Free-Form": "reasoning",
}
NOT_IN_TURN = "turns that are not question, answer, question, answer"
_NAMES_NO_PICTURE, _NO_BOX = "a box names none of the pictures", "no box and no 'None' in the answer"
_ORDINAL = re.compile(rf"\b({'|'.join(ORDINALS)}) (?:image|frame)", re.I)
_FIRST = re.compile(r"the first (?:image|frame)", re.I)


def read_mgrounding(folder: Path) -> Iterator[Record | Fault]:
    """Every question of every conversation."""
    merged = folder / f"{NAME}.json"
    subsets = (file for name in KIND_OF_SUBSET for file in find_files(folder, f"{name}/*.json"))
    files = [merged] if is_file(merged) else sorted(subsets)
    if not files:
        raise GemvgError(f"{merged}: no such file; {LAYOUT}")
    for content, where in stream_files(files, LAYOUT):
        yield from _read_conversation(content, folder, where)


def _read_conversation(content: Any, folder: Path, where: str) -> Iterator[Record | Fault]:
    try:
        if not isinstance(content["images"], list):
            raise TypeError("images are a list")
        names = [name.partition(f"{NAME}/")[2] or name.removeprefix("./") for name in content["images"]]
        subset = Path(names[0]).parts[0]
        paths = tuple(_find_picture(folder, str(inside(Path(), name))) for name in names)
        turns = read_turns(content["conversations"])
    except MALFORMED as error:
        yield Fault(where, f"not laid out as MGrounding-630k ({type(error).__name__})")
        return
    if subset not in KIND_OF_SUBSET:
        yield Fault(where, "an unknown subset")
        return
    if not turns:
        yield Fault(where, NOT_IN_TURN)
        return
    if sum(text.count("<image>") for text in turns) != len(names):
        yield Fault(where, "not one <image> a picture")
        return
    sizes = measure_all(paths)
    if isinstance(sizes, Fault):
        yield sizes
        return
    texts = place_images(turns)
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        yield _read_turn(question, answer, paths, sizes, KIND_OF_SUBSET[subset], where)


def read_turns(conversation: Any) -> list[str]:
    """The texts of a conversation's turns, question, answer, question, answer; none where they are not that."""
    turns = [(turn["from"], turn["value"].strip()) for turn in conversation]
    in_turn = [speaker for speaker, _ in turns] == ["human", "gpt"] * (len(turns) // 2)
    return [text for _, text in turns] if in_turn else []


def place_images(texts: Sequence[str]) -> list[str]:
    """The texts without the pictures that stand first, or last on their own lines; Image-N for one in a sentence."""
    placed, number = [], 0
    for text in texts:
        rest = re.sub(r"^(?:\s*<image>)+\s*", "", text)
        number += text.count("<image>") - rest.count("<image>")
        bare = re.sub(r"(?:\n\s*<image>)+\s*$", "", rest)
        last = rest.count("<image>") - bare.count("<image>")
        while "<image>" in bare:
            number += 1
            bare = bare.replace("<image>", f"Image-{number}", 1)
        number += last
        placed.append(bare)
    return placed


def _read_turn(
    question: str, answer: str, paths: tuple[Path, ...], sizes: tuple[Size, ...], kind: Kind, where: str
) -> Record | Fault:
    if kind == "temporal":
        ordered = _name_first_frame(question, answer, paths)
        if ordered is None:
            return Fault(where, "a shuffled sequence that names pictures by their place in time")
        question = ordered
    boxes, problem = read_boxes(question, answer, sizes)
    if problem == _NO_BOX:
        return Record(paths, sizes, question, (), "understanding", NAME, words=answer)
    return Fault(where, problem) if problem else Record(paths, sizes, question, boxes, kind, NAME)


def read_boxes(question: str, answer: str, sizes: tuple[Size, ...]) -> tuple[tuple[Box, ...], str | None]:
    """(an answer's boxes, what is wrong with them); of several pictures the answer names theirs, or the question."""
    boxes, problem = _read_boxes(answer, sizes)
    if problem == _NAMES_NO_PICTURE and (asked := asked_image(question)) is not None:
        boxes, problem = _read_boxes(f"Image-{asked + 1}: {answer}", sizes)
    return boxes, re.sub(r"\d+", "..", problem) if problem else None  # faults are counted by their words


def _read_boxes(answer: str, sizes: tuple[Size, ...]) -> tuple[tuple[Box, ...], str | None]:
    found = read_answer(answer, sizes, AnswerFormat())
    return tuple(sorted(set(found.boxes))), found.problem  # an equal box is the same one


def _name_first_frame(question: str, answer: str, paths: Sequence[Path]) -> str | None:
    """The question with its first frame named by list position, None if a shuffled record names others by time."""
    numbers = [int(found[-1]) if (found := re.findall(r"\d+", path.stem)) else -1 for path in paths]
    if all(a < b for a, b in pairwise(numbers)):
        return question
    if -1 in numbers or len(set(numbers)) < len(numbers) or _ORDINAL.search(answer):
        return None
    named = _FIRST.sub(f"Image-{numbers.index(min(numbers)) + 1}", question)
    return None if _ORDINAL.search(named) else named


def _find_picture(folder: Path, name: str) -> Path:
    return folder / name if is_file(folder / name) else folder / UNPACKED / name
