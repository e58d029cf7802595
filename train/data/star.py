"""STAR's situation graphs (boxes of people and things in key frames of videos) -> temporal records.

    FOLDER/STAR_train.json       [{"video_id", "situations": {frame: {"bbox": [[x1, y1, x2, y2] or null, ..],
                                   "bbox_labels": ["o000", ..]}}}], a question an entry
    FOLDER/object_classes.txt    "o000 person", a class a line
    FOLDER/frames/<video_id>.mp4/<frame>.png    as Action Genome's tool dumps them

Format: github.com/csbobby/STAR_Benchmark, README and code/visualization_tools. What it maps to (ours; the questions and
their worded answers are not used):

    a person or thing in 2..4 key frames of a video; it is shown in one and asked in the others    temporal

Things are annotated where somebody deals with them, so a frame without a box of a thing is not shown with it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, read_text
from train.data.annotations import MALFORMED, inside, numbers, read_json
from train.data.masks import Corners
from train.data.record import Fault, Record
from train.data.sightings import OTHER_TIME, Sighting, follow, spread

LAYOUT = "put STAR_train.json, object_classes.txt and frames/ of github.com/csbobby/STAR_Benchmark into the folder"
Video = dict[str, dict[str, Corners | None]]  # label -> frame -> box, None where questions disagree


def read_star(folder: Path, split: str = "train", seed: int = 0) -> Iterator[Record | Fault]:
    """Each person and thing of each video, over groups of its key frames."""
    names = _read_classes(folder / "object_classes.txt")
    file = folder / f"STAR_{split}.json"
    videos: dict[str, Video] = defaultdict(lambda: defaultdict(dict))
    for number, question in enumerate(read_json(file, list, LAYOUT)):
        where = f"{file}, item {number}"
        try:
            inside(folder, video := question["video_id"])
            for frame, situation in question["situations"].items():
                inside(folder, frame)
                yield from _read_frame(videos[video], frame, situation, names, f"{where}, frame {int(frame)}")
        except MALFORMED as error:
            yield Fault(where, f"not laid out as STAR ({type(error).__name__})")
    for video, labels in sorted(videos.items()):
        rng = np.random.default_rng([seed, *video.encode()])
        for label, boxes in sorted(labels.items()):
            sure = {frame: corners for frame, corners in boxes.items() if corners}
            for frames in spread(sorted(sure, key=int), rng):
                pictures = [
                    Sighting(folder / "frames" / f"{video}.mp4" / f"{frame}.png", sure[frame]) for frame in frames
                ]
                if record := follow(pictures, names[label], OTHER_TIME, "temporal", "STAR", rng):
                    yield record


def _read_classes(file: Path) -> dict[str, str]:
    """Label -> words."""
    if not is_file(file):
        raise GemvgError(f"{file}: no such file; {LAYOUT}")
    rows = [line.split(maxsplit=1) for line in read_text(file).splitlines() if line.strip()]
    count = Counter(row[0] for row in rows)  # a label that stands twice has no meaning
    return {row[0]: " or ".join(row[1].split("/")) for row in rows if len(row) == 2 and count[row[0]] == 1}


def _read_frame(video: Video, frame: str, situation: Any, names: dict[str, str], where: str) -> Iterator[Fault]:
    """Add a frame's boxes to its video; a label with several in it is ambiguous and left out."""
    labels, boxes = situation["bbox_labels"], situation["bbox"]
    several = {label for label, box in zip(labels, boxes, strict=True) if box != boxes[labels.index(label)]}
    for label, box in zip(labels, boxes, strict=True):
        if label not in names:
            yield Fault(where, "an unknown category")
        elif box is not None and label not in several:
            try:
                x1, y1, x2, y2 = numbers(box, 4)
            except MALFORMED:
                yield Fault(where, "a malformed box")
                continue
            corners = (x1, y1, x2, y2)
            if video[label].setdefault(frame, corners) not in (corners, None):
                video[label][frame] = None
                yield Fault(where, "another box than an earlier question has; the thing is left out of this frame")
