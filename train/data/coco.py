"""COCO instances -> referential and semantic records of several pictures.

    FOLDER/annotations/instances_train2017.json    {"images": [{id, file_name, width, height}],
        "categories": [{id, name}], "annotations": [{image_id, category_id, bbox: [x, y, w, h], iscrowd}]}
    FOLDER/train2017/000000000009.jpg

Format: cocodataset.org, "Format data". What it maps to (ours; the paper does not say):

    every object of one category, over 1..4 pictures of which some show none     referential
    the one kind of object that all of 2..4 pictures share                       semantic

A category with a crowd region in a picture is not asked of that picture: not all of its objects are boxed there. A
picture is left out, and named, where an annotation of it cannot be read or may be of another one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemvg_edge.boxes import Box
from train.data.annotations import (
    MALFORMED,
    Id,
    Index,
    as_object,
    by_id,
    entries,
    identity,
    index_by_id,
    index_pictures,
    inside,
    numbers,
    read_json,
    read_size,
    with_ids,
)
from train.data.labelled import EVERY, LabelledPicture, ask_for, check_picture, pick
from train.data.pictures import measure_as
from train.data.record import Fault, Record

LAYOUT = "lay the folder out as annotations/instances_train2017.json and train2017/*.jpg (cocodataset.org/#download)"
NO_TARGET_SHARE = 0.08
TRIES = 10  # draws of a companion before a picture goes without
COMMON = ("the kind of object that all the pictures show", "these pictures share one kind of object; find all of them")
COMMON_IN = "these pictures share one kind of object; find it in image {image}"


def read_coco(folder: Path, split: str = "train2017", seed: int = 0, rounds: int = 1) -> Iterator[Record | Fault]:
    """A referential and, where one can be made, a semantic record a picture and round, in an order of the seed."""
    pictures = []
    for item in label_pictures(folder, split):
        if isinstance(item, Fault):
            yield item
        else:
            pictures.append(item)
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        yield from compose_pictures(pictures, rng)


def label_pictures(folder: Path, split: str) -> Iterator[LabelledPicture | Fault]:
    """Every picture of the split with its boxes by category, in the order of their ids."""
    file = folder / "annotations" / f"instances_{split}.json"
    content = read_json(file, dict, LAYOUT)
    pictures, annotations, listed = (entries(content, key, file) for key in ("images", "annotations", "categories"))
    images = index_pictures(with_ids(pictures), str(file))
    names = index_by_id(((key, _name_of(as_object(entry))) for key, entry in with_ids(listed)), "category", str(file))
    yield from (*images.faults, *names.faults)
    found, spoilt = list[Annotation](), set[Id]()
    for entry in annotations:
        if identity(entry, "image_id") in images.doubled:
            continue  # a picture that is named and left out already
        if isinstance(annotation := _read_annotation(entry, images, names), str):
            spoilt |= images.meant(entry.get("image_id")) if isinstance(entry, dict) else set()
            yield Fault(f"{file}: annotation {identity(entry)}", f"{annotation}; its picture is left out")
        else:
            found.append(annotation)
    # An annotation need not have an id, but of two with the same one may be the older draft of the other.
    numbered = index_by_id(((a.id, a) for a in found if a.id is not None), "annotation", str(file), equal_is_one=True)
    yield from numbered.faults
    spoilt |= {annotation.image for annotation in found if annotation.id in numbered.doubled}
    objects: dict[Id, dict[str, set[Box]]] = defaultdict(lambda: defaultdict(set))  # an equal box is the same one
    unsure: dict[Id, set[str]] = defaultdict(set)
    for annotation in found:
        if annotation.crowd:
            unsure[annotation.image].add(annotation.name)
        else:
            objects[annotation.image][annotation.name].add(annotation.box)
    for image, entry in by_id(images.entries.items()):
        if image not in spoilt:
            yield _label(folder / split, image, entry, objects[image], unsure[image])


class Annotation(NamedTuple):
    """One object in one picture."""

    id: Id | None
    image: Id
    name: str
    box: Box
    crowd: bool


def _name_of(entry: dict[str, Any]) -> str | None:
    name = entry.get("name")
    return name.strip() or None if isinstance(name, str) else None


def _read_annotation(entry: Any, images: Index, names: Index) -> Annotation | str:
    """An annotation, or what is wrong with it."""
    try:
        category, image, crowd = entry["category_id"], identity(entry, "image_id"), entry.get("iscrowd")
        x, y, w, h = numbers(entry["bbox"], 4)
        name = names.find(category)
    except KeyError as error:
        return f"no field {error}"
    except MALFORMED:
        return "a malformed annotation"
    if isinstance(category, (list, dict)) or crowd not in (0, 1, None):
        return "a malformed annotation"
    if name is None:
        return "an unknown category"
    if image is None or image not in images.entries:
        return "an unknown picture"
    return Annotation(identity(entry), image, name, Box(0, x, y, x + w, y + h), bool(crowd))


def _label(
    folder: Path, image: Id, entry: Any, objects: dict[str, set[Box]], unsure: set[str]
) -> LabelledPicture | Fault:
    try:
        path, size = inside(folder, entry["file_name"]), read_size(entry)
    except MALFORMED:
        return Fault(f"{folder}: image {image}", "a malformed image entry")
    measured = measure_as(path, size)
    if isinstance(measured, Fault):
        return measured
    boxes = {name: tuple(sorted(found)) for name, found in objects.items() if name not in unsure}
    return check_picture(LabelledPicture(path, size, boxes, frozenset(unsure)))


def compose_pictures(pictures: Sequence[LabelledPicture], rng: np.random.Generator) -> Iterator[Record]:
    """Records that start from each picture once."""
    showing: dict[str, list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        for label in picture.objects:
            showing[label].append(index)
    for start in rng.permutation(len(pictures)):
        labels = sorted(pictures[start].objects)
        if not labels:
            continue
        label = pick(labels, rng)
        yield _every(pictures, showing, int(start), label, rng)
        if record := _common(pictures, showing, int(start), label, rng):
            yield record


def _every(
    pictures: Sequence[LabelledPicture],
    showing: dict[str, list[int]],
    start: int,
    label: str,
    rng: np.random.Generator,
) -> Record:
    """Every object of the label, over pictures of which about half show one; seldom a label that none shows."""
    chosen = [start]
    for _ in range(rng.integers(4)):
        pool: Sequence[int] = showing[label] if rng.random() < 0.5 else range(len(pictures))
        for _ in range(TRIES):
            other = pick(pool, rng)
            if other not in chosen and label not in pictures[other].unsure:
                chosen.append(other)
                break
    shown = [pictures[chosen[k]] for k in rng.permutation(len(chosen))]
    if rng.random() < NO_TARGET_SHARE:
        absent = sorted(name for name in showing if not any(picture.shows(name) for picture in shown))
        label = pick(absent, rng) if absent else label
    return ask_for(label, pick(EVERY, rng).format(label=label), shown, "referential", "COCO")


def _common(
    pictures: Sequence[LabelledPicture],
    showing: dict[str, list[int]],
    start: int,
    label: str,
    rng: np.random.Generator,
) -> Record | None:
    """The kind of object that the pictures share, if some pictures share this one and no other."""
    count, pool = 2 + int(rng.integers(3)), showing[label]
    for _ in range(TRIES):
        chosen = sorted({start, *(pick(pool, rng) for _ in range(count - 1))})
        shown = [pictures[chosen[k]] for k in rng.permutation(len(chosen))]
        shared = set.intersection(*({*picture.objects, *picture.unsure} for picture in shown))
        if len(chosen) == count and shared == {label}:
            if rng.random() < 0.5:
                return ask_for(label, pick(COMMON, rng), shown, "semantic", "COCO")
            only = int(rng.integers(count))
            return ask_for(label, COMMON_IN.format(image=only + 1), shown, "semantic", "COCO", only)
    return None
