"""Pictures whose objects of some labels are all boxed, and records that ask for every object of one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from gemvg_edge.boxes import Box
from train.data.pictures import Size
from train.data.record import Fault, Kind, Record, check

T = TypeVar("T")
EVERY = ("every {label}", "find every {label}", "each {label} in the pictures", "all objects of the kind '{label}'")


@dataclass(frozen=True)
class LabelledPicture:
    """A picture and the boxes of its objects, by label, with image index 0."""

    path: Path
    size: Size
    objects: Mapping[str, tuple[Box, ...]]
    unsure: frozenset[str] = frozenset()  # labels of which some objects are not boxed one by one

    def shows(self, label: str) -> bool:
        """Whether an object of the label is in the picture, boxed or not."""
        return label in self.objects or label in self.unsure


def check_picture(picture: LabelledPicture) -> LabelledPicture | Fault:
    """The picture, or why it is left out: one wrong box makes `every` wrong too."""
    boxes = tuple(box for found in picture.objects.values() for box in found)
    # Its boxes are held to what every record is held to; the words do not matter.
    reason = check(Record((picture.path,), (picture.size,), "every object", boxes, "referential", ""))
    return Fault(str(picture.path), reason) if reason else picture


def ask_for(
    label: str, query: str, pictures: Sequence[LabelledPicture], kind: Kind, source: str, only: int | None = None
) -> Record:
    """All boxes of a label in the pictures as shown, or in picture number `only` of them."""
    boxes = tuple(
        replace(box, image=image)
        for image, picture in enumerate(pictures)
        if only in (None, image)
        for box in sorted(picture.objects.get(label, ()))
    )
    paths, sizes = tuple(picture.path for picture in pictures), tuple(picture.size for picture in pictures)
    return Record(paths, sizes, query, boxes, kind, source)


def pick(items: Sequence[T], rng: np.random.Generator) -> T:
    """One of several, each as likely."""
    return items[int(rng.integers(len(items)))]
