"""MIG-Bench's items as records, to evaluate on and to look at: a benchmark is never trained on.

    FOLDER/revised_MIG_bench.json (or MIG_data.json)
        [{"task", "images": [..], "question", "answer": [x1, y1, x2, y2], "additional_info", "need_format"}]
    FOLDER/MIG-Bench/images/<task>/... or FOLDER/images/<task>/...

Format: the two published files (Michael4933/Migician and Tajamul21/MIG-Agent). The older one writes 0..1, the revised
one whole steps 0..1000. An item has one box; the question names its picture last, except that regions lie in the source
picture, which is the first, and that `additional_info` names it for group grounding. The older file's static
differences name none and are refused. What its tasks map to (ours, after GeM-VG's kinds):

    group_grounding, refer_grounding, region              referential
    common_object, correspondence, diff, view_diff        semantic
    multi_view                                            spatial
    object_tracking                                       temporal
    reasoning                                             reasoning
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemvg_edge.boxes import RELATIVE_FRAME, Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file
from train.data.annotations import MALFORMED, inside, numbers, read_json
from train.data.pictures import measure_all
from train.data.record import Fault, Kind, Record

LAYOUT = "unpack huggingface.co/datasets/Michael4933/MIG-Bench in the folder, the json beside MIG-Bench/images"
FILES = ("revised_MIG_bench.json", "MIG_data.json")
KIND_OF_TASK: dict[str, Kind] = {
    "group_grounding": "referential",
    "refer_grounding": "referential",
    "region": "referential",
    "common_object": "semantic",
    "correspondence": "semantic",
    "diff": "semantic",
    "view_diff": "semantic",
    "multi_view": "spatial",
    "object_tracking": "temporal",
    "reasoning": "reasoning",
}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_MENTION = re.compile(rf"image[-\s](\d{{1,3}})|(\d{{1,3}})(?:st|nd|rd|th) image|({'|'.join(ORDINALS)}) image", re.I)


@dataclass(frozen=True)
class Item:
    """An item as its file says it, without its pictures."""

    task: str
    images: tuple[str, ...]
    question: str
    corners: tuple[float, float, float, float]  # 0..1 of the target picture's own width and height
    target: int  # 0-based


def read_mig_bench(folder: Path) -> Iterator[Record | Fault]:
    """Every item of the benchmark, the revised file if there is one."""
    file = next((folder / name for name in FILES if is_file(folder / name)), folder / FILES[0])
    for number, content in enumerate(read_json(file, list, LAYOUT)):
        item = parse_item(content, f"{file}, item {number}")
        yield item if isinstance(item, Fault) else _to_record(item, folder)


def parse_item(content: Any, where: str) -> Item | Fault:
    """An item, or why it cannot be used; needs no pictures."""
    try:
        task, images, question = content["task"], _names(content["images"]), content["question"].strip()
        corners = numbers(content["answer"], 4)
        info = str(content.get("additional_info", ""))
    except MALFORMED as error:
        return Fault(where, f"not laid out as MIG-Bench ({type(error).__name__})")
    if not isinstance(task, str) or task not in KIND_OF_TASK:
        return Fault(where, "an unknown task")
    frame = 1 if max(corners) <= 1 else RELATIVE_FRAME
    if min(corners) < 0 or max(corners) > frame:
        return Fault(where, "a box outside its picture")
    target = target_image(task, question, info)
    if target is None:
        return Fault(where, "the question names no picture")
    if not 0 <= target < len(images):
        return Fault(where, "a box in a picture that is not there")
    x1, y1, x2, y2 = (value / frame for value in corners)
    return Item(task, images, question, (x1, y1, x2, y2), target)


def _names(images: Any) -> tuple[str, ...]:
    """The pictures that an item names; ValueError where they are no paths within the folder."""
    if not isinstance(images, list):
        raise TypeError("images are a list")
    return tuple(str(inside(Path(), name)) for name in images)


def target_image(task: str, question: str, info: str) -> int | None:
    """The 0-based picture that an item's box lies in; None where nothing says it."""
    return 0 if task == "region" else asked_image(info if task == "group_grounding" else question)


def asked_image(text: str) -> int | None:
    """The 0-based picture that a question names last, which is the one to look in."""
    mentions = _MENTION.findall(text)
    if not mentions:
        return None
    number, nth, ordinal = mentions[-1]
    return ORDINALS.index(ordinal.lower()) if ordinal else int(number or nth) - 1


def _to_record(item: Item, folder: Path) -> Record | Fault:
    try:
        paths = tuple(find_picture(folder, name) for name in item.images)
    except GemvgError:
        return Fault(str(folder), "a picture whose name the system refuses")
    sizes = measure_all(paths)
    if isinstance(sizes, Fault):
        return sizes
    (width, height), (x1, y1, x2, y2) = sizes[item.target], item.corners
    box = Box(item.target, x1 * width, y1 * height, x2 * width, y2 * height)
    return Record(paths, sizes, item.question, (box,), KIND_OF_TASK[item.task], "MIG-Bench")


def find_picture(folder: Path, name: str) -> Path:
    """Where the picture lies: the older file writes ./MIG-Bench/images, and the folder may be MIG-Bench itself."""
    relative = name.removeprefix("./")
    within = folder / relative.removeprefix("MIG-Bench/")
    return within if is_file(within) else folder / relative
