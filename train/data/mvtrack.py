"""MVTrack (one object followed by several cameras) -> spatial and temporal records.

    FOLDER/train_split.txt (or mvtrack_train_split.txt)    sequences, one a line: bag1-1
    FOLDER/bag1/bag1-1/img/00001.jpg                       scene, sequence (a camera), frames from 1
    FOLDER/bag1/bag1-1/groundtruth.txt                     a row a frame: x,y,w,h
    FOLDER/bag1/bag1-1/invisible.txt                       a 0 or 1 a frame, by commas; 1 is hidden or out of view

Format: github.com/XuM007/MITracker, README and its loader, which takes frame k of all cameras of a scene as one moment.
What it maps to (ours, as is to take a moment every STRIDE frames):

    one moment, 2..4 cameras; the object is shown in one and asked in the others       spatial
    one camera, 2..4 moments; the object is shown at one and asked at the others       temporal
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, read_text
from train.data.annotations import MALFORMED, inside, numbers
from train.data.record import Fault, Record
from train.data.sightings import MOST, OTHER_CAMERA, OTHER_TIME, Sighting, follow, spread

LAYOUT = "lay the folder out as the README of github.com/XuM007/MITracker says, with its split files"
STRIDE = 30  # frames; neighbours show nearly the same


def read_mvtrack(folder: Path, split: str = "train", seed: int = 0) -> Iterator[Record | Fault]:
    """Every scene of the split: each moment over its cameras, and each camera over its moments."""
    names = (folder / f"{split}_split.txt", folder / f"mvtrack_{split}_split.txt")
    file = next((name for name in names if is_file(name)), None)
    if file is None:
        raise GemvgError(f"{names[0]}: no such file; {LAYOUT}")
    scenes: dict[str, list[str]] = defaultdict(list)
    for sequence in sorted(set(read_text(file).split())):  # one that is listed twice is one camera
        scenes[sequence.partition("-")[0]].append(sequence)
    for scene, sequences in scenes.items():
        views = []
        for sequence in sequences:
            try:
                place = inside(folder, scene, sequence)
            except ValueError:
                yield Fault(f"{file}, sequence {sequence!r:.80}", "a sequence that names no folder")
                continue
            sightings = list(_read_sequence(place))
            yield from (item for item in sightings if isinstance(item, Fault))
            views.append({k: item for k, item in enumerate(sightings) if isinstance(item, Sighting)})
        yield from _compose_scene(scene, views, np.random.default_rng([seed, *scene.encode()]))


def _read_sequence(folder: Path) -> Iterator[Sighting | Fault]:
    """A sighting a moment, as one camera has it."""
    truth, flags = folder / "groundtruth.txt", folder / "invisible.txt"
    try:
        if missing := [file for file in (truth, flags) if not is_file(file)]:
            yield Fault(str(missing[0]), "a missing annotation file")
            return
        rows = [line.split(",") for line in read_text(truth).split()]
        hidden = [("0", "1").index(flag) for flag in read_text(flags).replace(",", " ").split()]
    except ValueError:  # GemvgError is one
        yield Fault(str(folder), "an annotation file that cannot be read")
        return
    if len(rows) != len(hidden):
        yield Fault(str(folder), "not as many boxes as flags")
        return
    for index in range(0, len(rows), STRIDE):
        picture = folder / "img" / f"{index + 1:05}.jpg"
        if hidden[index]:
            yield Sighting(picture, None)
            continue
        try:
            x, y, w, h = numbers([float(value) for value in rows[index]], 4)
        except MALFORMED:
            yield Fault(f"{folder}/groundtruth.txt, row {index + 1}", "a malformed box")
        else:
            yield Sighting(picture, (x, y, x + w, y + h))


def _compose_scene(scene: str, views: list[dict[int, Sighting]], rng: np.random.Generator) -> Iterator[Record | Fault]:
    name = re.sub(r"\d+$", "", scene).replace("_", " ") or "object"
    for moment in sorted(set[int]().union(*views)):
        seen = [view[moment] for view in views if moment in view]
        chosen = [seen[k] for k in rng.permutation(len(seen))[:MOST]]
        if record := follow(chosen, name, OTHER_CAMERA, "spatial", "MVTrack", rng):
            yield record
    for view in views:
        for group in spread([view[moment] for moment in sorted(view)], rng):
            if record := follow(group, name, OTHER_TIME, "temporal", "MVTrack", rng):
                yield record
