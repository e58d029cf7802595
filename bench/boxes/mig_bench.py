"""MIG-Bench: its questions as its authors asked them, and its scores as they were published, to the digit.

    FOLDER/revised_MIG_bench.json or FOLDER/MIG_data.json, pictures in FOLDER/MIG-Bench/images/<task>/ or FOLDER/images/

Two versions are told apart by content: the older one's boxes are shares 0..1, the revised one's whole steps 0..1000.
Protocol (eval/MIG_bench_eval.py and utils.py of Michael4933/Migician; UniVG-R1 and MIG-Agent for the revised file): the
first box of the first of six patterns that occurs in the text; IoU without regard to the picture; the mean of ten tasks
counts each alike. The scripts for the revised file read whole numbers alone, the older one also shares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.boxes.answers import Answered, Benchmark, Question
from bench.boxes.rated import Rated, means
from gemvg_edge.boxes import RELATIVE_FRAME, Box, iou
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable
from gemvg_edge.json_object import short
from train.data.annotations import MALFORMED, inside, numbers, read_json
from train.data.mig_bench import FILES, LAYOUT, find_picture, target_image
from train.data.pictures import measure_all
from train.data.record import Fault

REVISED, OLD = "revised", "old"
# How many items each task has, in the paper's order: (old, revised).
ITEMS = {
    "diff": (528, 528),
    "view_diff": (94, 94),
    "common_object": (816, 815),
    "object_tracking": (550, 550),
    "multi_view": (288, 288),
    "region": (1203, 1203),
    "refer_grounding": (99, 99),
    "group_grounding": (499, 485),
    "reasoning": (101, 97),
    "correspondence": (117, 117),
}
TASKS = tuple(ITEMS)
NEW_TOKENS = 256  # UniVG-R1's; Migician's script has 128, which cuts nothing but reasoning
# The scripts' own words, spelling kept; appended without a space, whether or not the item says `need_format`.
DIRECT = "Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. Don't generate addtional words."
THINK = (
    " First output the thinking process in <think> </think> tags and then output the bounding box in "
    "<answer> </answer> tags."
)
THRESHOLDS = (0.3, 0.5, 0.7)
VALUES = (*(f"acc@{threshold}" for threshold in THRESHOLDS), "mean_iou", "acc@0.5_right_image")
NO_BOX = [0.0, 0.0, 0.0, 0.0]
_SHARE = r"(\d+\.\d+)"
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)",
        rf"\[{_SHARE},\s*{_SHARE},\s*{_SHARE},\s*{_SHARE}\]",
        rf"\({_SHARE},{_SHARE}\),\({_SHARE},{_SHARE}\)",
        rf"\({_SHARE},\s*{_SHARE},\s*{_SHARE},\s*{_SHARE}\)",
        r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]",
        r"<box>(\d+)\s+(\d+)\s+(\d+)\s+(\d+)</box>",
    )
)
_LOCATIONS = re.compile(r"<loc_(\d{1,6})><loc_(\d{1,6})><loc_(\d{1,6})><loc_(\d{1,6})>")


def load(folder: Path, think: bool = False) -> Benchmark:
    """Every item with its pictures; GemvgError names an item or a picture that is not as published."""
    file, contents = read_items(folder)
    version = version_of([content.get("answer") for content in contents], file)
    questions = tuple(_question(content, number, version, file, think) for number, content in enumerate(contents))
    return Benchmark("mig-bench", version, folder, questions, 1024 if think else NEW_TOKENS)


def read_items(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The annotation file of a folder, the revised one if it has both, and its items."""
    file = next((folder / name for name in FILES if is_file(folder / name)), folder / FILES[0])
    contents = read_json(file, list, LAYOUT)
    for number, content in enumerate(contents):
        if not isinstance(content, dict) or str(content.get("task")) not in ITEMS:
            raise GemvgError(f"{printable(file)}, item {number} is none of MIG-Bench's ten tasks; {LAYOUT}")
    return file, contents


def version_of(boxes: Iterable[Any], file: Path) -> str:
    """Which version the true boxes are of; GemvgError where they are of both, or of none."""
    found: dict[str, int] = {}
    for number, box in enumerate(boxes):
        try:
            corners = numbers(box, 4)
        except MALFORMED:
            raise GemvgError(f"{printable(file)}, item {number} has the box {short(box)}; {LAYOUT}") from None
        shares, steps = max(corners) <= 1, all(corner == int(corner) for corner in corners)
        if min(corners) < 0 or max(corners) > RELATIVE_FRAME or not (shares or steps):
            raise GemvgError(f"{printable(file)}, item {number} has the box {short(box)}, in neither version's frame")
        if not (shares and steps):  # a box of zeros and ones alone could be of either
            found.setdefault(OLD if shares else REVISED, number)
    if len(found) > 1:
        raise GemvgError(
            f"{printable(file)} mixes MIG-Bench's versions: item {found[OLD]} has shares of 0..1 as the old one, item "
            f"{found[REVISED]} steps of 0..1000 as the revised one; use one file"
        )
    return next(iter(found), REVISED)


def missing_items(counts: dict[str, int], version: str) -> str | None:
    """What tells a set of answers or items from the published benchmark, in words; None where nothing does."""
    column = (OLD, REVISED).index(version)
    short_of = [
        f"{task} {counts.get(task, 0)} of {n[column]}" for task, n in ITEMS.items() if counts.get(task, 0) != n[column]
    ]
    return f"not the whole {version} benchmark ({', '.join(short_of)})" if short_of else None


def _question(content: dict[str, Any], number: int, version: str, file: Path, think: bool) -> Question:
    where = f"{printable(file)}, item {number}"
    try:
        task, question = content["task"], content["question"]
        names = [inside(Path(), name).as_posix() for name in content["images"]]
        info = str(content.get("additional_info", ""))
        x1, y1, x2, y2 = content["answer"]
        if not isinstance(question, str) or not question.strip() or not names or x1 >= x2 or y1 >= y2:
            raise ValueError("no question, no pictures, or a true box without an area")
    except MALFORMED as error:
        raise GemvgError(f"{where} is not laid out as MIG-Bench ({error}); {LAYOUT}") from None
    paths = tuple(find_picture(file.parent, name) for name in names)
    sizes = measure_all(paths)
    if isinstance(sizes, Fault):
        raise GemvgError(f"{sizes.where} is {sizes.reason}; {LAYOUT}; `bench.score --answers` needs no pictures")
    target = target_image(task, question, info)
    truth: tuple[Box, ...] = ()
    if target is not None and 0 <= target < len(sizes):
        frame = 1 if version == OLD else RELATIVE_FRAME
        (width, height), (x1, y1, x2, y2) = sizes[target], content["answer"]
        scale = width / frame, height / frame
        truth = (Box(target, x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]),)
    return Question(
        f"{task}/{number}",
        task,
        tuple(path.relative_to(file.parent) for path in paths),
        sizes,
        question.strip(),
        truth,
        question + (THINK if think else DIRECT),
        {"corners": content["answer"]},
    )


def parse(text: str, version: str = REVISED) -> Sequence[float]:
    """The box that the published scripts read in a text, in the version's own frame; four zeros where none is read."""
    found = next((match for pattern in _PATTERNS if (match := pattern.search(text))), None)
    if found is None:
        return NO_BOX
    try:
        if version == REVISED:
            return [int(value) for value in found.groups()]
        values = [float(value) for value in found.groups()]
    except ValueError:  # a share, or a number of thousands of digits
        return NO_BOX
    return [value / RELATIVE_FRAME if value >= 1 else value for value in values]


def stretch(box: Sequence[float], version: str = REVISED) -> Sequence[float]:
    """Migician's "linear scaling on the y axis", which its authors apply to its answers and to no other model's."""
    frame = 1 if version == OLD else RELATIVE_FRAME
    found = list(box)
    try:
        for place, factor in ((1, 1.05), (3, 1.10)):
            share = round(min(found[place] / frame * factor, 0.999), 3)
            found[place] = share if version == OLD else int(share * RELATIVE_FRAME)
    except OverflowError:
        pass
    return found


def published_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU as the scripts compute it; 0 where they would divide by zero, or leave every range."""
    left, top, right, bottom = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    if right < left or bottom < top:
        return 0.0
    try:
        both = (right - left) * (bottom - top)
        return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
    except (ZeroDivisionError, OverflowError):
        return 0.0


def in_digits(text: str, locations: int) -> str:
    """A text with location tokens, which no published model writes, as the scripts can read it."""

    def write(found: re.Match[str]) -> str:
        values = [round(int(value) * RELATIVE_FRAME / (locations - 1)) for value in found.groups()]
        return "({},{}),({},{})".format(*values)

    return _LOCATIONS.sub(write, text) if locations > 1 else text


def rate(answers: Iterable[Answered], version: str, locations: int = 0, stretched: bool = False) -> Rated:
    """Every answer's values, named as in VALUES."""
    return Rated.of((_row(answer, version, locations, stretched) for answer in answers), VALUES)


def _row(answer: Answered, version: str, locations: int, stretched: bool) -> tuple[int, str, str, list[float]]:
    truth: Any = answer.extra.get("corners")
    try:
        numbers(truth, 4)
    except MALFORMED:
        raise GemvgError(f"answer {short(answer.id)}: corners is {short(truth)}, not MIG-Bench's true box") from None
    if answer.part not in ITEMS:
        raise GemvgError(f"answer {short(answer.id)} is of {short(answer.part)}, none of MIG-Bench's ten tasks")
    text = in_digits(answer.answer, locations)
    box = parse(text, version)
    overlap = published_iou(truth, stretch(box, version) if stretched else box)
    right = float("nan")
    if answer.truth:
        first = answer.boxes[0] if answer.boxes else None
        right = float(first is not None and iou(first, answer.truth[0]) >= 0.5)
    hits = [float(overlap >= threshold) for threshold in THRESHOLDS]
    return answer.number, answer.id, answer.part, [*hits, overlap, right]


def score(rated: Rated, version: str) -> dict[str, Any]:
    """The figures by task and over tasks, and what is missing of the published benchmark."""
    counts = {task: rated.parts.count(task) for task in set(rated.parts)}
    return {**means(rated, TASKS), "version": version, "incomplete": missing_items(counts, version)}
