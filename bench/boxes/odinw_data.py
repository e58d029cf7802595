"""ODINW-13's questions, from the folder that its sets are unpacked in.

    FOLDER/AerialMaritimeDrone/large/valid/{annotations_without_background.json, *.jpg}, and so on: see SETS

Layout: the `odinw` folder of GLIP and mmdetection (configs/odinw). What is asked by which protocol: odinw.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.boxes.answers import Benchmark, Question
from gemvg_edge.boxes import Box, Size
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable
from train.data.annotations import (
    MALFORMED,
    as_object,
    corners_of,
    entries,
    identity,
    index_all,
    inside,
    read_json,
    read_size,
)
from train.data.pictures import measure_as
from train.data.record import Fault

ALL, PRESENT = "all-classes", "present-classes"
PROTOCOLS = (ALL, PRESENT)
LAYOUT = "unpack the 13 sets of ODINW (mmdetection's configs/odinw says from where) into one folder"
VALID, NAMES = "valid", "annotations_without_background.json"
# Where each set lies, and its classes in the order that mmdetection and the prompt have them.
SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "AerialMaritimeDrone": ("AerialMaritimeDrone/large", ("boat", "car", "dock", "jetski", "lift")),
    "Aquarium": (
        "Aquarium/Aquarium Combined.v2-raw-1024.coco",
        ("fish", "jellyfish", "penguin", "puffin", "shark", "starfish", "stingray"),
    ),
    "CottontailRabbits": ("CottontailRabbits", ("Cottontail-Rabbit",)),
    "EgoHands": ("EgoHands/generic", ("hand",)),
    "NorthAmericaMushrooms": (
        "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco",
        ("CoW", "chanterelle"),
    ),
    "Packages": ("Packages/Raw", ("package",)),
    "PascalVOC": (
        "PascalVOC",
        ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
         "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    ),
    "pistols": ("pistols/export", ("pistol",)),
    "pothole": ("pothole", ("pothole",)),
    "Raccoon": ("Raccoon/Raccoon.v2-raw.coco", ("raccoon",)),
    "ShellfishOpenImages": ("ShellfishOpenImages/raw", ("Crab", "Lobster", "Shrimp")),
    "thermalDogsAndPeople": ("thermalDogsAndPeople", ("dog", "person")),
    "VehiclesOpenImages": ("VehiclesOpenImages/416x416", ("Ambulance", "Bus", "Car", "Motorcycle", "Truck")),
}  # fmt: skip
NEW_TOKENS = 1024


@dataclass(frozen=True)
class Picture:
    """One picture of a set."""

    number: int  # its place in the annotations
    path: Path
    size: Size
    truth: tuple[Box, ...]  # labelled by class


def load(folder: Path, own_words: bool, protocols: Iterable[str] = PROTOCOLS) -> Benchmark:
    """The questions of both protocols, or of one, about every set; GemvgError names what is not as published."""
    missing = [name for name in SETS if not is_file(_annotations(folder, name)[0])]
    if missing:
        raise GemvgError(f"{printable(_annotations(folder, missing[0])[0])}: no such file; {LAYOUT}")
    questions, protocols = list[Question](), list(protocols)
    task = "odinw13" if len(protocols) > 1 else f"odinw13:{protocols[0]}"
    for name in SETS:
        pictures = list(_pictures(folder, name))
        for protocol in protocols:
            questions += [q for picture in pictures for q in _ask(picture, name, protocol, own_words, folder)]
    return Benchmark(task, "", folder, tuple(questions), NEW_TOKENS)


def _annotations(folder: Path, name: str) -> tuple[Path, Path]:
    """(the annotations of a set, the folder that its pictures are named from)."""
    place = folder / SETS[name][0]
    return (place / f"val_{NAMES}", place) if name == "pistols" else (place / VALID / NAMES, place / VALID)


def _pictures(folder: Path, name: str) -> Iterable[Picture]:
    file, place = _annotations(folder, name)
    content = read_json(file, dict, LAYOUT)
    classes = {name.lower(): name for name in SETS[name][1]}
    known: dict[Any, str] = {}
    for key, entry in index_all(content, "categories", "category", file, LAYOUT).items():
        if (label := classes.get(str(as_object(entry).get("name")).lower())) is not None:
            known[key] = label
    if lacking := set(classes.values()) - set(known.values()):
        raise GemvgError(f"{printable(file)} has no class {sorted(lacking)[0]!r}; {LAYOUT}")
    images = index_all(content, "images", "image", file, LAYOUT)
    boxes: dict[Any, list[Box]] = {}
    for number, entry in enumerate(entries(content, "annotations", file)):
        try:
            x1, y1, x2, y2 = corners_of(entry["bbox"])
            image, crowd = identity(entry, "image_id"), entry.get("iscrowd", 0)
            label = known.get(identity(entry, "category_id"))
            if image not in images or label is None or crowd not in (0, 1):
                raise ValueError("an unknown image, a class that is not the set's, or iscrowd is neither 0 nor 1")
        except MALFORMED as error:
            raise GemvgError(f"{printable(file)}, annotation {number} cannot be used ({error}); {LAYOUT}") from None
        box = Box(0, x1, y1, x2, y2, label=label, score=1.0 if crowd else None)
        boxes.setdefault(image, []).append(box)
    for number, (key, entry) in enumerate(images.items()):
        try:
            path, size = inside(place, entry["file_name"]), read_size(entry)
        except MALFORMED as error:
            raise GemvgError(f"{printable(file)}, image {number} is malformed ({error}); {LAYOUT}") from None
        if isinstance(found := measure_as(path, size), Fault):
            raise GemvgError(f"{found.where} is {found.reason}; {LAYOUT}; `bench.score --answers` needs no pictures")
        yield Picture(number, path, size, tuple(boxes.get(key, ())))


def _ask(picture: Picture, name: str, protocol: str, own_words: bool, folder: Path) -> Iterable[Question]:
    classes = SETS[name][1]
    if protocol == ALL and not own_words:
        wanted = ", ".join(classes)
        text = f"Locate every instance that belongs to the following categories: '{wanted}'."
        yield _question(picture, name, protocol, "", wanted, f"{text} Report bbox coordinates in JSON format.", folder)
        return
    present = {box.label for box in picture.truth}
    for label in classes if protocol == ALL else [label for label in classes if label in present]:
        text = f"Locate every {label} in the image and output the coordinates in JSON format."
        yield _question(picture, name, protocol, label, f"every {label}", text, folder)


def _question(
    picture: Picture, name: str, protocol: str, label: str, query: str, published: str, folder: Path
) -> Question:
    return Question(
        f"{protocol}/{name}/{picture.number}" + (f"/{label}" if label else ""),
        f"{protocol}/{name}",
        (picture.path.relative_to(folder),),
        (picture.size,),
        query,
        tuple(box for box in picture.truth if label in ("", box.label)),
        published,
        {"picture": picture.number, "asked_for": label},
    )
