"""RefCOCO, RefCOCO+ and RefCOCOg -> referential records of one picture, one an expression.

    FOLDER/refs(unc).p       pickled list [{ref_id, ann_id, image_id, split, sentences: [{"sent": ..}]}]; or (umd)..
    FOLDER/instances.json    COCO-like: images {id, file_name, width, height}, annotations {id, image_id, bbox: x y w h}
    PICTURES/COCO_train2014_000000581857.jpg    by default ../images/mscoco/images/train2014 of FOLDER

Format: github.com/lichengunc/refer, refer.py. FOLDER is one of its refcoco, refcoco+, refcocog. The three share
pictures: one's training split holds pictures of another's test split. What it maps to (ours):

    one expression, one object    referential

The pickle is read without running what it asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gemvg_edge.boxes import Box
from gemvg_edge.files import is_file
from train.data.annotations import (
    MALFORMED,
    Index,
    entries,
    identity,
    index_by_id,
    index_pictures,
    inside,
    numbers,
    read_json,
    read_pickle,
    read_size,
    with_ids,
)
from train.data.pictures import measure_as
from train.data.record import Fault, Record

LAYOUT = "unpack refcoco.zip (github.com/lichengunc/refer) and give the folder that holds refs(..).p and instances.json"
AUTHORS = ("unc", "umd", "google")
PICTURES = Path("images/mscoco/images/train2014")


def split_by(folder: Path) -> str:
    """Whose split a data set's folder has: the first of unc, umd and google; unc where there is none."""
    return next((by for by in AUTHORS if is_file(folder / f"refs({by}).p")), AUTHORS[0])


def read_refcoco(folder: Path, split: str = "train", pictures: Path | None = None) -> Iterator[Record | Fault]:
    """Every expression of one split, in the order of the file."""
    file = folder / f"refs({split_by(folder)}).p"
    found = read_pickle(file, list, LAYOUT)
    instances = folder / "instances.json"
    content = read_json(instances, dict, LAYOUT)
    images, annotations = (
        index(with_ids(entries(content, key, instances)), str(instances))
        for key, index in (("images", index_pictures), ("annotations", _index_annotations))
    )
    yield from (*images.faults, *annotations.faults)
    for number, ref in enumerate(found):
        where = f"{file}, reference {number}"
        try:
            if ref["split"] != split:
                continue
            sentences = [sentence["sent"] for sentence in ref["sentences"]]
            image, annotation = images.find(ref["image_id"]), annotations.find(ref["ann_id"])
        except MALFORMED as error:
            yield Fault(where, f"not laid out as a reference ({type(error).__name__})")
            continue
        yield from _read_reference(sentences, image, annotation, pictures or folder.parent / PICTURES, where)


def _index_annotations(items: Iterable[tuple[Any, Any]], where: str) -> Index:
    return index_by_id(items, "annotation", where, equal_is_one=True)


def _read_reference(
    sentences: list[Any], image: Any, annotation: Any, pictures: Path, where: str
) -> Iterator[Record | Fault]:
    if image is None or annotation is None:
        yield Fault(where, "an unknown picture or annotation")
        return
    try:
        x, y, w, h = numbers(annotation["bbox"], 4)
        path, size = inside(pictures, image["file_name"]), read_size(image)
    except MALFORMED:
        yield Fault(where, "a malformed picture or annotation")
        return
    if identity(annotation, "image_id") is None or identity(annotation, "image_id") != identity(image):
        yield Fault(where, "an annotation of another picture")
        return
    measured = measure_as(path, size)
    if isinstance(measured, Fault):
        yield measured
        return
    for sentence in sentences:
        if not isinstance(sentence, str):
            yield Fault(where, "an expression that is no text")
            continue
        yield Record((path,), (size,), sentence, (Box(0, x, y, x + w, y + h),), "referential", "RefCOCO")
