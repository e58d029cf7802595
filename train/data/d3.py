"""D3, the Description Detection Dataset -> referential records over pictures of one scene.

    FOLDER/d3_pkl/{sentences,annotations,images,groups}.pkl    dicts by id, arrays of numpy in them
    FOLDER/d3_images/...                                       `file_name` of images.pkl

    sentences    {id, raw_sent, is_negative}     annotations    {image_id, sent_id: [..], bbox: [[x, y, w, h]]}
    images       {id, file_name, width, height}  groups         {id, img_id: [..], inner_sent_id: [..]}

Format: github.com/shikras/d-cube, doc.md and d3.py (which takes the first row of `bbox`). Every description of a group
is annotated on every picture of it, so that a picture may truly show none. What it maps to (ours):

    a description of presence or absence, over 1..4 pictures of its group    referential

The pickles are read without running what they ask for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemvg_edge.boxes import Box
from train.data.annotations import MALFORMED, identity, numbers, read_pickle
from train.data.coco import picture_key
from train.data.labelled import LabelledPicture, ask_for, check_picture
from train.data.pictures import measure_as
from train.data.record import Fault, Record

LAYOUT = "unpack d3_images.zip and d3_pkl.zip of github.com/shikras/d-cube side by side in the folder"


def read_d3(folder: Path, seed: int = 0, leave_out: frozenset[str] = frozenset()) -> Iterator[Record | Fault]:
    """Each description once on each picture of its group; `leave_out` holds picture keys."""
    sentences, annotations, images, groups = (
        read_pickle(folder / "d3_pkl" / f"{name}.pkl", dict, LAYOUT)
        for name in ("sentences", "annotations", "images", "groups")
    )
    texts = {key: text for key, entry in sentences.items() if isinstance(text := identity(entry, "raw_sent"), str)}
    boxes: dict[Any, dict[str, list[Box]]] = defaultdict(lambda: defaultdict(list))
    spoilt = set()
    for key, entry in _by_id(annotations):
        try:
            x, y, w, h = numbers(np.atleast_2d(entry["bbox"])[0].tolist(), 4)
            for sentence in entry["sent_id"]:
                boxes[entry["image_id"]][texts[sentence]].append(Box(0, x, y, x + w, y + h))
        except MALFORMED:
            spoilt.add(identity(entry, "image_id"))
            yield Fault(f"{folder}: annotation {key}", "a malformed annotation; its picture is left out")
    pictures: dict[Any, LabelledPicture] = {}
    for key, entry in _by_id(images):
        if key not in spoilt:
            picture = _label(folder / "d3_images", key, entry, boxes[key], leave_out)
            if isinstance(picture, Fault):
                yield picture
            else:
                pictures[key] = picture
    rng = np.random.default_rng(seed)
    for key, group in _by_id(groups):
        try:
            shown = [pictures[image] for image in sorted(group["img_id"]) if image in pictures]
            descriptions = [texts[sentence] for sentence in sorted(group["inner_sent_id"])]
        except MALFORMED:
            yield Fault(f"{folder}: group {key}", "a malformed group")
            continue
        yield from _compose_group(shown, descriptions, rng)


def _by_id(table: dict[Any, Any]) -> list[tuple[Any, Any]]:
    return sorted(table.items(), key=lambda item: str(item[0]).rjust(16))


def _label(
    folder: Path, key: Any, entry: Any, boxes: dict[str, list[Box]], leave_out: frozenset[str]
) -> LabelledPicture | Fault:
    try:
        path, size = folder / entry["file_name"], (int(entry["width"]), int(entry["height"]))
    except MALFORMED:
        return Fault(f"{folder}: image {key}", "a malformed image entry")
    if picture_key(path.name) in leave_out:
        return Fault(str(path), "a picture of a benchmark, left out")
    measured = measure_as(path, size)
    if isinstance(measured, Fault):
        return measured
    return check_picture(LabelledPicture(path, size, {text: tuple(sorted(found)) for text, found in boxes.items()}))


def _compose_group(
    pictures: list[LabelledPicture], descriptions: list[str], rng: np.random.Generator
) -> Iterator[Record]:
    """Each description over the group's pictures in random order, 1..4 at a time."""
    for text in descriptions:
        order = [pictures[k] for k in rng.permutation(len(pictures))]
        while order:
            count = 1 + int(rng.integers(4))
            yield ask_for(text, text, order[:count], "referential", "D3")
            order = order[count:]
