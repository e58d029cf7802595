"""One object seen in several pictures, by other cameras or at other times, and the record that follows it.

Its box in one picture is part of the query, as MIG-Bench writes it; the boxes in the others are the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.boxes import RELATIVE_STEPS, Box, to_steps
from train.data.labelled import pick
from train.data.masks import Corners
from train.data.pictures import measure_all
from train.data.record import Fault, Kind, Record, check

T = TypeVar("T")
MOST = 4  # pictures a record
OTHER_CAMERA = (
    "the {name} marked {box} in image {image}: find it in the other views of the scene",
    "these are views of one scene; find the {name} of image {image}, {box}, in the other images",
)
OTHER_TIME = (
    "the {name} marked {box} in image {image}: find it in the other frames of the video",
    "these are frames of one video; find the {name} of image {image}, {box}, in the other images",
)


@dataclass(frozen=True)
class Sighting:
    """A picture and where the object is in it, x1 y1 x2 y2 in pixels; None if it is known not to be seen."""

    picture: Path
    corners: Corners | None


def follow(
    sightings: Sequence[Sighting], name: str, phrases: Sequence[str], kind: Kind, source: str, rng: np.random.Generator
) -> Record | Fault | None:
    """One sighting as the query and the others as the answer; None without a sighting to show and another picture."""
    seen = [index for index, sighting in enumerate(sightings) if sighting.corners]
    if not seen or len(sightings) < 2:
        return None
    paths = tuple(sighting.picture for sighting in sightings)
    sizes = measure_all(paths)
    if isinstance(sizes, Fault):
        return sizes
    boxes = [Box(index, *corners) for index, sighting in enumerate(sightings) if (corners := sighting.corners)]
    shown = pick(boxes, rng)
    x1, y1, x2, y2 = to_steps(shown, sizes[shown.image], RELATIVE_STEPS)
    if x1 == x2 or y1 == y2:
        return Fault(str(paths[shown.image]), "a box to show that is thinner than a thousandth of its picture")
    mark = f"{BOX_START}({x1},{y1}),({x2},{y2}){BOX_END}"
    query = pick(phrases, rng).format(name=name, box=mark, image=shown.image + 1)
    record = Record(paths, sizes, query, tuple(boxes), kind, source)
    if reason := check(record):  # before the shown box leaves the answer
        return Fault(str(paths[shown.image]), reason)
    return replace(record, boxes=tuple(box for box in boxes if box != shown))


def spread(frames: Sequence[T], rng: np.random.Generator) -> Iterator[Sequence[T]]:
    """Groups of 2..MOST frames, each group spread over the whole time and in its order."""
    count = 2 + int(rng.integers(MOST - 1))
    groups = max(1, -(-len(frames) // count))
    yield from (frames[first::groups] for first in range(groups))
