"""Rendered tabletop scenes -> training samples: which views, which questions, flips, and how hard when.

A run is one list of draws, and draw k is fixed by (seed, k): the same pictures and questions come whether or not the
run was interrupted. The first CURRICULUM_SHARE of the draws show one picture, the rest two or (seldom) three or one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from gemvg_edge.answer import AnswerFormat, write_answer
from train.collate import Sample, Turn
from train.dense_head import SeenObject
from train.meshes import MESHES
from train.queries import ask
from train.tabletop import COLOURS, TabletopScene, View

_NAMES = {name: k for k, name in enumerate(MESHES)}
_COLOURS = {colour: k for k, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class TabletopSample(Sample):
    """A sample that also knows all that its pictures show, for the dense head."""

    seen: tuple[tuple[SeenObject, ...], ...]
    wanted: tuple[tuple[int, ...], ...]  # of each question: which of the seen objects, counted over all pictures


def image_counts(draws: int, curriculum_share: float, seed: int) -> list[int]:
    """How many pictures each draw shows."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([1, 2, 3], size=draws, p=[0.15, 0.75, 0.1])
    counts[: round(draws * curriculum_share)] = 1
    return [int(count) for count in counts]


def draw_sample(
    scenes: list[TabletopScene],
    folder: Path,
    images: int,
    questions: int,
    answer_format: AnswerFormat,
    rng: np.random.Generator,
) -> TabletopSample:
    """One scene seen by `images` of its cameras in random order, each picture mirrored half the time."""
    scene = scenes[rng.integers(len(scenes))]
    order = rng.permutation(len(scene.views))[:images]
    views: list[View] = []
    pictures: list[Image.Image] = []
    for k in order:
        view = scene.views[k]
        picture: Image.Image = Image.open(folder / view.file)
        if rng.random() < 0.5:
            view, picture = _mirror(view), ImageOps.mirror(picture)
        views.append(view)
        pictures.append(picture)
    sizes = [(view.width, view.height) for view in views]
    seen_boxes = [view.box(k, image) for image, view in enumerate(views) for k in range(len(scene.objects))]
    seen_boxes = [box for box in seen_boxes if box is not None]
    turns, wanted = [], []
    for _ in range(questions):
        query = ask(scene, views, rng)
        turns.append(Turn(query.text, write_answer(query.boxes, sizes, answer_format)))
        wanted.append(tuple(seen_boxes.index(box) for box in query.boxes))
    return TabletopSample(pictures, turns, tuple(_seen(scene, view) for view in views), tuple(wanted))


def _mirror(view: View) -> View:
    boxes = tuple(None if b is None else (view.width - b[2], b[1], view.width - b[0], b[3]) for b in view.boxes)
    return View(view.file, view.width, view.height, boxes)


def _seen(scene: TabletopScene, view: View) -> tuple[SeenObject, ...]:
    w, h = view.width, view.height
    return tuple(
        SeenObject(_NAMES[name], _COLOURS[colour], (box[0] / w, box[1] / h, box[2] / w, box[3] / h))
        for (name, colour), box in zip(scene.objects, view.boxes, strict=True)
        if box is not None
    )
