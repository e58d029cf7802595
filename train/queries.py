"""Questions about tabletop scenes and their true answers. Knows scenes and boxes, neither pixels nor tokens.

Kinds: `object` ("the red mug"), `colour` ("everything that is red"), `name` ("every mug"); any of them may be asked
of one image only ("... in image 2"), and some have no target at all. Hard negatives borrow the colour and the name of
things that are on the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemvg_edge.boxes import Box
from train.meshes import MESHES
from train.tabletop import COLOURS, TabletopScene, View

PHRASES = {
    "object": ("the {colour} {name}", "every {colour} {name}", "find the {colour} {name}", "{colour} {name}"),
    "colour": ("everything that is {colour}", "every {colour} object", "all {colour} things"),
    "name": ("every {name}", "all {name}s", "find each {name}"),
}
KIND_SHARES = {"object": 0.6, "colour": 0.2, "name": 0.2}
ONE_IMAGE_SHARE = 0.15
NO_TARGET_SHARE = 0.12


@dataclass(frozen=True)
class Query:
    """A question and the boxes that answer it, in pixels of the views in the order they are shown."""

    text: str
    boxes: tuple[Box, ...]
    kind: str


def ask(scene: TabletopScene, views: Sequence[View], rng: np.random.Generator) -> Query:
    """One random question about the views, in the order given."""
    kind = str(rng.choice(list(KIND_SHARES), p=list(KIND_SHARES.values())))
    name, colour = _subject(scene, kind, rng)
    text = str(rng.choice(PHRASES[kind])).format(colour=colour, name=name)
    images = list(range(len(views)))
    if len(views) > 1 and rng.random() < ONE_IMAGE_SHARE:
        images = [int(rng.choice(images))]
        text += f" in image {images[0] + 1}"
    wanted = [
        k
        for k, (its_name, its_colour) in enumerate(scene.objects)
        if (kind == "colour" or its_name == name) and (kind == "name" or its_colour == colour)
    ]
    found = (views[image].box(k, image) for image in images for k in wanted)
    return Query(text, tuple(sorted(box for box in found if box is not None)), kind)


def held_out_question(scene: TabletopScene, cameras: int) -> tuple[tuple[View, ...], Query]:
    """The one question that evaluation asks of a held-out scene: fixed by the scene's seed."""
    rng = np.random.default_rng([scene.seed, cameras])
    views = scene.views[:cameras]
    return views, ask(scene, views, rng)


def phrases() -> list[str]:
    """Every question that can be asked, for training a tokenizer."""
    texts = [
        phrase.format(colour=colour, name=name)
        for kind in PHRASES
        for phrase in PHRASES[kind]
        for colour in COLOURS
        for name in MESHES
    ]
    return texts + [f"{text} in image {n}" for text in texts for n in (1, 2, 3)]


def _subject(scene: TabletopScene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """(name, colour) to ask for: mostly something on the table, sometimes something that is not."""
    objects = set(scene.objects)
    if rng.random() >= NO_TARGET_SHARE:
        return scene.objects[rng.integers(len(scene.objects))]
    names, colours = list(MESHES), list(COLOURS)
    seen_names, seen_colours = {name for name, _ in objects}, {colour for _, colour in objects}
    while True:
        name, colour = str(rng.choice(names)), str(rng.choice(colours))
        if rng.random() < 0.5:
            near = scene.objects[rng.integers(len(scene.objects))]
            name, colour = (near[0], colour) if rng.random() < 0.5 else (name, near[1])
        absent = {
            "object": (name, colour) not in objects,
            "colour": colour not in seen_colours,
            "name": name not in seen_names,
        }
        if absent[kind]:
            return name, colour
