"""Pascal VOC and labelme folders, as people label their own pictures -> referential records of one picture.

    FOLDER/Annotations/2007_000027.xml    <annotation><filename>, <size>, <object><name>, <bndbox><xmin>..
    FOLDER/JPEGImages/2007_000027.jpg

    FOLDER/**/shelf.json    {"imagePath": "shelf.jpg", "imageWidth", "imageHeight",
                             "shapes": [{"label", "points": [[x, y], ..], "shape_type": "rectangle"}]}

Formats: the VOC2012 development kit (whose pixels count from 1, the last one inside the box) and
github.com/wkentaro/labelme (corners in any order, in pixels from 0). What they map to (ours):

    every object of one class in one picture    referential
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from train.data.annotations import MALFORMED, numbers
from train.data.labelled import LabelledPicture, ask_for, check_picture
from train.data.pictures import Size, measure_as
from train.data.record import Fault, Record

VOC_LAYOUT = "lay the folder out as Annotations/*.xml and JPEGImages/*.jpg"
LABELME_LAYOUT = "give the folder that labelme saved its .json files in"
# VOC writes some of its class names as one word.
WORDS = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "TV monitor"}


def read_voc(folder: Path) -> Iterator[Record | Fault]:
    """One record for each class in each picture, in the order of the file names."""
    files = sorted((folder / "Annotations").glob("*.xml"))
    if not files:
        raise GemvgError(f"{folder / 'Annotations'}: no .xml files there; {VOC_LAYOUT}")
    for file in files:
        try:
            name, size, objects = _parse_voc(ElementTree.parse(file).getroot())
        except (*MALFORMED, OSError, ElementTree.ParseError) as error:
            yield Fault(str(file), f"not laid out as Pascal VOC ({type(error).__name__})")
            continue
        yield from _ask_for_each(folder / "JPEGImages" / name, size, objects, "Pascal VOC")


def read_labelme(folder: Path) -> Iterator[Record | Fault]:
    """One record for each label in each picture, in the order of the file names."""
    files = sorted(folder.rglob("*.json"))
    if not files:
        raise GemvgError(f"{folder}: no .json files there; {LABELME_LAYOUT}")
    for file in files:
        try:
            name, size, objects = _parse_labelme(json.loads(file.read_text(encoding="utf-8")))
        except (*MALFORMED, OSError, RecursionError) as error:
            yield Fault(str(file), f"not laid out as labelme ({type(error).__name__})")
            continue
        yield from _ask_for_each(file.parent / name, size, objects, "labelme")


def _parse_voc(root: ElementTree.Element) -> tuple[str, Size, list[tuple[str, Box]]]:
    objects = []
    for found in root.iter("object"):
        x1, y1, x2, y2 = (float(_text(found, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        name = _text(found, "name")
        objects.append((WORDS.get(name, name), Box(0, x1 - 1, y1 - 1, x2, y2)))
    size = int(_text(root, "size/width")), int(_text(root, "size/height"))
    return _text(root, "filename"), size, objects


def _text(element: ElementTree.Element, path: str) -> str:
    if (text := element.findtext(path)) is None:
        raise ValueError(f"no {path}")
    return text.strip()


def _parse_labelme(content: Any) -> tuple[str, Size, list[tuple[str, Box]]]:
    objects = []
    for shape in content["shapes"]:
        points = [numbers(point, 2) for point in shape["points"]]
        match shape.get("shape_type") or "polygon":  # the first versions wrote polygons only and no type
            case "rectangle" | "polygon" | "mask":
                corners = [*map(min, zip(*points, strict=True)), *map(max, zip(*points, strict=True))]
            case "circle":
                (x, y), edge = points
                radius = math.dist((x, y), edge)
                corners = [x - radius, y - radius, x + radius, y + radius]
            case other:
                raise ValueError(f"a shape {other!r} has no box")
        objects.append((str(shape["label"]), Box(0, *corners)))
    size = int(content["imageWidth"]), int(content["imageHeight"])
    return content["imagePath"].replace("\\", "/"), size, objects


def _ask_for_each(path: Path, size: Size, objects: list[tuple[str, Box]], source: str) -> Iterator[Record | Fault]:
    measured = measure_as(path, size)
    if isinstance(measured, Fault):
        yield measured
        return
    by_label: dict[str, list[Box]] = defaultdict(list)
    for label, box in objects:
        by_label[label].append(box)
    picture = check_picture(LabelledPicture(path, size, {label: tuple(found) for label, found in by_label.items()}))
    if isinstance(picture, Fault):
        yield picture
        return
    for label in sorted(by_label):
        yield ask_for(label, f"every {label}" if label.strip() else "", [picture], "referential", source)
