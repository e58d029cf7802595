"""Ego-Exo4D relations (one object in the wearer's and in the room's cameras) -> spatial records.

    FOLDER/<take>/<camera>/<frame>.jpg    one frame a second; the wearer's camera has "aria" in its name
    FOLDER/relations_train.json           {"annotations": {take: {"object_masks": {object: {camera:
                                              {"annotation": {frame: {"width", "height", "encodedMask"}}}}}}}}
  or, once process_data.py has unpacked the masks,
    FOLDER/split.json                     {"train": [take, ..], "val": [..], "test": [..]}
    FOLDER/<take>/annotation.json         {"masks": {object: {camera: {frame: {"size": [h, w], "counts": ".."}}}}}

Format: github.com/EGO4D/ego-exo4d-relation, whose correspondence/SegSwap/data/process_data.py makes the pictures from
the videos; they are smaller than the masks, so boxes are scaled. What it maps to (ours):

    an object at one moment, in the wearer's and 1..3 other cameras; shown in one, asked in the others    spatial

A camera without a mask at that moment is not shown: the object may be hidden there, or not annotated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file
from train.data.annotations import MALFORMED, inside, read_json
from train.data.masks import Corners, mask_box, unpack
from train.data.pictures import measure
from train.data.record import LARGEST_SIDE, Fault, Record, whole
from train.data.sightings import MOST, OTHER_CAMERA, Sighting, follow

LAYOUT = "make the folder with process_data.py of github.com/EGO4D/ego-exo4d-relation, with its split.json in it"


def read_ego_exo(folder: Path, split: str = "train", seed: int = 0) -> Iterator[Record | Fault]:
    """Every object at every moment that the wearer's and another camera have masks of."""
    for take, where, masks in _list_takes(folder, split):
        if isinstance(masks, Fault):
            yield masks
            continue
        try:
            take_folder = inside(folder, take)
        except ValueError:
            yield Fault(where, "a take that names no folder")
            continue
        # A generator a take, so that a take that is missing here does not change the others.
        rng = np.random.default_rng([seed, *take.encode()])
        try:
            moments = list(_list_moments(masks))
        except MALFORMED as error:
            yield Fault(where, f"not laid out as Ego-Exo4D relations ({type(error).__name__})")
            continue
        for name, frame, views in moments:
            if record := _follow_views(take_folder, name, frame, views, rng):
                yield record


def _list_takes(folder: Path, split: str) -> Iterator[tuple[str, str, Any]]:
    """(take, where it stands, its masks or a fault) in either layout."""
    relations = folder / f"relations_{split}.json"
    if is_file(relations):
        takes = read_json(relations, dict, LAYOUT).get("annotations")
        if not isinstance(takes, dict):
            raise GemvgError(f"{relations} has no object 'annotations'; {LAYOUT}")
        for take, content in sorted(takes.items()):
            yield take, f"{relations}, take {take}", content.get("object_masks") if isinstance(content, dict) else None
        return
    listed = read_json(folder / "split.json", dict, LAYOUT).get(split)
    if not isinstance(listed, list):
        raise GemvgError(f"{folder / 'split.json'} has no list {split!r}; {LAYOUT}")
    # A take that is listed twice is one.
    for take in sorted({name if isinstance(name, str) else repr(name) for name in listed}):
        try:
            file = inside(folder, take) / "annotation.json"
            found = is_file(file)
        except ValueError:
            yield take, take, Fault(f"{folder / 'split.json'}, take {take!r:.80}", "a take that names no folder")
            continue
        masks = read_json(file, dict, LAYOUT).get("masks") if found else Fault(str(file), "a missing take")
        yield take, str(file), masks


def _list_moments(masks: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(object, frame, camera -> mask) wherever the wearer's camera and another one have a mask."""
    for name, views in sorted(masks.items()):
        cameras = {camera: view.get("annotation", view) for camera, view in views.items()}
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
        try:
            picture = inside(folder, camera, f"{frame}.jpg")
        except ValueError:
            return Fault(f"{folder}: camera {camera!r:.80}", "a camera or a frame that names no file")
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
        packed = "encodedMask" in mask
        height, width = map(whole, (mask["height"], mask["width"]) if packed else mask["size"])
        if not 0 < min(height, width) <= max(height, width) <= LARGEST_SIDE:
            raise ValueError("no size of a picture")
        corners = mask_box(unpack(mask["encodedMask"]) if packed else mask["counts"], height, width)
        across, down = size[0] / width, size[1] / height
    except (*MALFORMED, ZeroDivisionError):
        return Fault(str(picture), "a malformed mask")
    if abs(across / down - 1) > 0.02:  # more than rounding: the mask is of another picture
        return Fault(str(picture), "a mask of another shape than its picture")
    return corners and (corners[0] * across, corners[1] * down, corners[2] * across, corners[3] * down)
