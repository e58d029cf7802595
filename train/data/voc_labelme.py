"""Pascal VOC and labelme folders, as people label their own pictures -> referential records of one picture.

    FOLDER/Annotations/2007_000027.xml    <annotation><filename>, <size>, <object><name>, <bndbox><xmin>..
    FOLDER/JPEGImages/2007_000027.jpg

    FOLDER/**/shelf.json    {"imagePath": "shelf.jpg", "imageWidth", "imageHeight",
                             "shapes": [{"label", "points": [[x, y], ..], "shape_type": "rectangle"}]}

Formats: the VOC2012 development kit (whose pixels count from 1, the last one inside the box) and
github.com/wkentaro/labelme (corners in any order, in pixels from 0). What they map to (ours):

    every object of one class in one picture    referential

A picture that several files label is left out: each of them may have only some of the objects.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from os.path import normpath
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import read_bytes, read_text
from gemvg_edge.json_object import parse_json
from train.data.annotations import MALFORMED, find_files, inside, numbers, read_size
from train.data.labelled import LabelledPicture, ask_for, check_picture
from train.data.pictures import Size, measure_as
from train.data.record import Fault, Record

VOC_LAYOUT = "lay the folder out as Annotations/*.xml and JPEGImages/*.jpg"
LABELME_LAYOUT = "give the folder that labelme saved its .json files in"
# VOC writes some of its class names as one word.
WORDS = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "TV monitor"}


def read_voc(folder: Path) -> Iterator[Record | Fault]:
    """One record for each class in each picture, in the order of the file names."""
    files = find_files(folder / "Annotations", "*.xml")
    if not files:
        raise GemvgError(f"{folder / 'Annotations'}: no .xml files there; {VOC_LAYOUT}")
    yield from _ask_for_all(files, lambda file: _parse_voc(file, folder / "JPEGImages"), "Pascal VOC")


def read_labelme(folder: Path) -> Iterator[Record | Fault]:
    """One record for each label in each picture, in the order of the file names."""
    files = find_files(folder, "**/*.json")
    if not files:
        raise GemvgError(f"{folder}: no .json files there; {LABELME_LAYOUT}")
    yield from _ask_for_all(files, _parse_labelme, "labelme")


def _ask_for_all(files: list[Path], parse: Callable[[Path], LabelledPicture], source: str) -> Iterator[Record | Fault]:
    """Records of every file that can be read; one that cannot be is a fault and no end."""
    parsed: list[tuple[Path, LabelledPicture]] = []
    for file in files:
        try:
            parsed.append((file, parse(file)))
        except (*MALFORMED, ElementTree.ParseError) as error:
            yield Fault(str(file), f"not laid out as {source} ({type(error).__name__})")
    count = Counter(normpath(picture.path) for _, picture in parsed)
    for file, picture in parsed:
        if count[normpath(picture.path)] > 1:
            yield Fault(str(file), "a picture that several files label")
        else:
            yield from _ask_for_each(picture, source)


def _parse_voc(file: Path, pictures: Path) -> LabelledPicture:
    root = ElementTree.fromstring(read_bytes(file), ElementTree.XMLParser(target=_NoEntities()))
    objects = []
    for found in root.iter("object"):
        x1, y1, x2, y2 = (float(_text(found, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        name = _text(found, "name")
        objects.append((WORDS.get(name, name), Box(0, x1 - 1, y1 - 1, x2, y2)))
    size = int(_text(root, "size/width")), int(_text(root, "size/height"))
    return _labelled(inside(pictures, _text(root, "filename")), size, objects)


class _NoEntities(ElementTree.TreeBuilder):
    """Refuses a document type: VOC has none, and its entities can make a short file fill the memory."""

    def doctype(self, *_: Any) -> None:
        raise ValueError("a document type")


def _text(element: ElementTree.Element, path: str) -> str:
    if (text := element.findtext(path)) is None:
        raise ValueError(f"no {path}")
    return text.strip()


def _parse_labelme(file: Path) -> LabelledPicture:
    content = parse_json(read_text(file))
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
            case _:
                raise ValueError("a shape that has no box")
        if not isinstance(shape["label"], str):
            raise TypeError("a label that is no text")
        objects.append((shape["label"].strip(), Box(0, *corners)))
    size = read_size({"width": content["imageWidth"], "height": content["imageHeight"]})
    name = content["imagePath"].replace("\\", "/")
    if not name or "\0" in name:
        raise ValueError("no name of a picture")
    return _labelled(file.parent / name, size, objects)  # which labelme itself writes as ../pictures/a.png


def _labelled(path: Path, size: Size, objects: list[tuple[str, Box]]) -> LabelledPicture:
    by_label: dict[str, set[Box]] = defaultdict(set)  # an equal box is the same one
    for label, box in objects:
        by_label[label].add(box)
    return LabelledPicture(path, size, {label: tuple(sorted(found)) for label, found in by_label.items()})


def _ask_for_each(picture: LabelledPicture, source: str) -> Iterator[Record | Fault]:
    measured = measure_as(picture.path, picture.size)
    checked = measured if isinstance(measured, Fault) else check_picture(picture)
    if isinstance(checked, Fault):
        yield checked
        return
    for label in sorted(picture.objects):
        yield ask_for(label, f"every {label}" if label.strip() else "", [picture], "referential", source)
