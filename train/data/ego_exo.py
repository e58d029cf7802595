"""Ego-Exo4D relations (one object in the wearer's and in the room's cameras) -> spatial records.

    FOLDER/split.json                     {"train": [take, ..], "val": [..], "test": [..]}
    FOLDER/<take>/annotation.json         {"masks": {object: {camera: {frame: {"size": [h, w], "counts": ".."}}}}}
    FOLDER/<take>/<camera>/<frame>.jpg    one frame a second; the wearer's camera has "aria" in its name

Format: what process_data.py of github.com/EGO4D/ego-exo4d-relation (correspondence/SegSwap/data) makes of the videos and
of relations_train.json, whose masks are packed once more; run it first, and copy its split.json. Its pictures are
smaller than the masks, so boxes are scaled. What it maps to (ours):

    an object at one moment, in the wearer's and 1..3 other cameras; it is shown in one and asked in the others    spatial

A camera without a mask at that moment is not shown: whether the object is hidden there or was not annotated is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train.data.annotations import MALFORMED, read_json
from train.data.masks import Corners, mask_box
from train.data.pictures import measure
from train.data.record import Fault, Record
from train.data.sightings import MOST, OTHER_CAMERA, Sighting, follow

LAYOUT = "make the folder with process_data.py of github.com/EGO4D/ego-exo4d-relation and copy its split.json into it"


def read_ego_exo(folder: Path, split: str = "train", seed: int = 0) -> Iterator[Record | Fault]:
    """Every object at every moment that the wearer's and another camera have masks of."""
    takes = read_json(folder / "split.json", dict, LAYOUT).get(split)
    if not isinstance(takes, list):
        yield Fault(str(folder / "split.json"), f"no split {split!r}")
        return
    for take in sorted(map(str, takes)):
        file = folder / take / "annotation.json"
        if not file.is_file():
            yield Fault(str(file), "a missing take")
            continue
        masks = read_json(file, dict, LAYOUT).get("masks")
        # A generator a take, so that a take that is missing here does not change the others.
        rng = np.random.default_rng([seed, *take.encode()])
        try:
            moments = list(_list_moments(masks))
        except MALFORMED as error:
            yield Fault(str(file), f"not laid out as Ego-Exo4D relations ({type(error).__name__})")
            continue
        for name, frame, views in moments:
            if record := _follow_views(file.parent, name, frame, views, rng):
                yield record


def _list_moments(masks: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(object, frame, camera -> mask) wherever the wearer's camera and another one have a mask."""
    for name, cameras in sorted(masks.items()):
        for ego in sorted(camera for camera in cameras if "aria" in camera):
            for frame in sorted(cameras[ego], key=int):
                others = sorted(c for c in cameras if "aria" not in c and cameras[c].get(frame))
                if others and cameras[ego][frame]:
                    yield name, frame, {camera: cameras[camera][frame] for camera in (ego, *others)}


def _follow_views(
    folder: Path, name: str, frame: str, views: dict[str, Any], rng: np.random.Generator
) -> Record | Fault | None:
    ego, *others = views
    chosen = [ego, *(others[k] for k in rng.permutation(len(others))[: MOST - 1])]
    sightings = []
    for camera in (chosen[k] for k in rng.permutation(len(chosen))):
        picture = folder / camera / f"{frame}.jpg"
        corners = _scaled_box(picture, views[camera])
        if isinstance(corners, Fault):
            return corners
        sightings.append(Sighting(picture, corners))
    words = re.sub(r"[_\s\d]+$", "", name).replace("_", " ") or "object"  # "stainless bowl_0"
    return follow(sightings, words, OTHER_CAMERA, "spatial", "Ego-Exo4D", rng)


def _scaled_box(picture: Path, mask: Any) -> Corners | Fault | None:
    """The mask's box in pixels of the picture, which may be smaller than the mask."""
    size = measure(picture)
    if isinstance(size, Fault):
        return size
    try:
        height, width = (int(extent) for extent in mask["size"])
        corners = mask_box(mask["counts"], height, width)
        across, down = size[0] / width, size[1] / height
    except (*MALFORMED, ZeroDivisionError):
        return Fault(str(picture), "a malformed mask")
    if abs(across / down - 1) > 0.02:  # more than rounding: the mask is of another picture
        return Fault(str(picture), "a mask of another shape than its picture")
    return corners and (corners[0] * across, corners[1] * down, corners[2] * across, corners[3] * down)
