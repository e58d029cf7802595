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
from train.data.annotations import (
    MALFORMED,
    Id,
    Index,
    as_id,
    as_object,
    by_id,
    identity,
    index_by_id,
    index_pictures,
    inside,
    numbers,
    read_pickle,
    read_size,
)
from train.data.labelled import LabelledPicture, ask_for, check_picture
from train.data.pictures import measure_as
from train.data.record import Fault, Record

LAYOUT = "unpack d3_images.zip and d3_pkl.zip of github.com/shikras/d-cube side by side in the folder"


def read_d3(folder: Path, seed: int = 0) -> Iterator[Record | Fault]:
    """Each description once on each picture of its group."""
    sentences, annotations, images, groups = (
        read_pickle(folder / "d3_pkl" / f"{name}.pkl", dict, LAYOUT)
        for name in ("sentences", "annotations", "images", "groups")
    )
    where = str(folder / "d3_pkl")
    texts = index_by_id(_filed(sentences), "sentence", where)
    known = index_pictures(_filed(images), where)
    grouped = index_by_id(_filed(groups), "group", where)
    numbered = index_by_id(_filed(annotations), "annotation", where)
    yield from (*texts.faults, *known.faults, *grouped.faults, *numbered.faults)
    boxes: dict[Id, dict[str, set[Box]]] = defaultdict(lambda: defaultdict(set))  # an equal box is the same one
    spoilt = set[Id]()
    for key, entry in annotations.items():
        image = identity(entry, "image_id")
        if image in known.doubled:
            continue  # a picture that is named and left out already
        try:
            found = _read_annotation(entry, texts)
            if as_id(key) not in numbered.entries or image not in known.entries:
                raise KeyError("a wrong id")
        except MALFORMED:
            spoilt |= known.meant(as_object(entry).get("image_id"))
            shown = type(key).__name__ if as_id(key) is None else key
            yield Fault(f"{folder}: annotation {shown}", "a malformed annotation; its picture is left out")
            continue
        for text, box in found:
            boxes[image][text].add(box)
    pictures: dict[Id, LabelledPicture] = {}
    for image, entry in by_id(known.entries.items()):
        if image not in spoilt:
            picture = _label(folder / "d3_images", image, entry, boxes[image])
            if isinstance(picture, Fault):
                yield picture
            else:
                pictures[image] = picture
    rng = np.random.default_rng(seed)
    for number, group in by_id(grouped.entries.items()):
        try:
            members = sorted({_known(image, known) for image in group["img_id"]})
            descriptions = [_text(sentence, texts) for sentence in sorted(set(group["inner_sent_id"]))]
        except MALFORMED:
            yield Fault(f"{folder}: group {number}", "a malformed group")
            continue
        yield from _compose_group([pictures[image] for image in members if image in pictures], descriptions, rng)


def _filed(table: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """(id, entry) of a table; an entry that is filed under another id than its own has none."""
    for key, entry in table.items():
        own = as_object(entry).get("id", key)
        yield (key if as_id(own) == as_id(key) else None), entry


def _read_annotation(entry: Any, texts: Index) -> list[tuple[str, Box]]:
    """An annotation's box for each description that it answers."""
    bbox = entry["bbox"]
    x, y, w, h = numbers(bbox[0] if isinstance(bbox[0], (list, tuple)) else bbox, 4)
    return [(_text(sentence, texts), Box(0, x, y, x + w, y + h)) for sentence in entry["sent_id"]]


def _text(sentence: Any, texts: Index) -> str:
    text = texts.find(sentence)["raw_sent"]
    if not isinstance(text, str):
        raise TypeError("a description that is no text")
    return text


def _known(image: Any, known: Index) -> Id:
    """The id of a picture that the data set has, even if it is left out."""
    key = as_id(image)
    if key is None or (key not in known.entries and key not in known.doubled):
        raise KeyError("an unknown picture")
    return key


def _label(folder: Path, key: Id, entry: Any, boxes: dict[str, set[Box]]) -> LabelledPicture | Fault:
    try:
        path, size = inside(folder, entry["file_name"]), read_size(entry)
    except MALFORMED:
        return Fault(f"{folder}: image {key}", "a malformed image entry")
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
