"""Which pictures are shown together: one, several cameras', before and after, or two places with things in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from gemvg_edge.boxes import Box
from gemvg_edge.marks import mark
from train.world.scenes import AFTER, BEFORE, MORE_CAMERAS, SAME_CAMERA, Corners, Scene, Thing, View

Role = Literal["single", "views", "time", "relatives", "cameras"]
ROLES: tuple[Role, ...] = get_args(Role)
OTHER_CAMERA_SHARE = 0.2  # of the sets in time: the second picture is another camera's


@dataclass(frozen=True)
class Seen:
    """One thing in one picture of a set."""

    box: Box
    thing: Thing
    identity: tuple[int, int]  # the scene's seed and the thing's number there

    @property
    def image(self) -> int:
        """The picture's index in the set."""
        return self.box.image

    @property
    def name(self) -> str:
        """What it is."""
        return self.thing[0]

    @property
    def colour(self) -> str:
        """Its colour's name."""
        return self.thing[1]

    @property
    def words(self) -> str:
        """`red mug`."""
        return f"{self.thing[1]} {self.thing[0]}"


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one question, in the order they are shown."""

    role: Role
    scenes: tuple[Scene, ...]  # of each picture
    views: tuple[View, ...]
    mirrored: bool = False  # the views are already
    one_camera: bool = False  # two moments of the same camera

    @property
    def count(self) -> int:
        """How many pictures."""
        return len(self.views)

    @property
    def scene(self) -> Scene:
        """The scene, where all pictures show one."""
        return self.scenes[0]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each picture."""
        return [view.size for view in self.views]

    @cached_property
    def seen(self) -> tuple[Seen, ...]:
        """All that can be seen, picture by picture and from left to right."""
        found = []
        for image, (scene, view) in enumerate(zip(self.scenes, self.views, strict=True)):
            row = [(box, k) for k in range(len(scene.things)) if (box := view.box(k, image))]
            row.sort(key=lambda pair: (pair[0].x1 + pair[0].x2, pair[1]))
            found += [Seen(box, scene.things[k], (scene.seed, k)) for box, k in row]
        return tuple(found)

    def in_image(self, image: int) -> list[Seen]:
        """What one picture shows, from left to right."""
        return [seen for seen in self.seen if seen.image == image]

    def mark(self, seen: Seen) -> str:
        """How a question shows this thing's box."""
        return mark(seen.box, self.sizes[seen.image])


def choose_pictures(scene: Scene, partner: Scene | None, role: Role, rng: np.random.Generator) -> PictureSet:
    """A set of a role around a scene; `relatives` needs the scene's relative, `cameras` a scene of six views."""
    if role == "single":
        return PictureSet(role, (scene,), (scene.views[rng.integers(len(scene.views))],))
    if role == "cameras":
        if not scene.has_more_cameras:
            raise ValueError("a set of more cameras needs a scene of six views")
        taken = rng.permutation(MORE_CAMERAS)[: rng.integers(3, len(MORE_CAMERAS) + 1)]
        return PictureSet(role, (scene,) * len(taken), tuple(scene.views[k] for k in taken))
    if role == "views":
        moment = BEFORE if rng.random() < 0.5 else AFTER
        return PictureSet(role, (scene, scene), tuple(scene.views[k] for k in rng.permutation(moment)))
    if role == "time":
        pair = SAME_CAMERA if rng.random() >= OTHER_CAMERA_SHARE else (int(rng.choice(BEFORE)), 3)
        views = tuple(scene.views[k] for k in pair)
        return PictureSet(role, (scene, scene), views, one_camera=pair == SAME_CAMERA)
    if partner is None:
        raise ValueError("a set of relatives needs two scenes")
    pair_of = [scene, partner] if rng.random() < 0.5 else [partner, scene]
    return PictureSet(role, tuple(pair_of), tuple(s.views[rng.integers(len(s.views))] for s in pair_of))


def relative(scene: Scene, scenes: Mapping[int, Scene]) -> Scene | None:
    """The scene of the neighbouring seed that shares things with this one."""
    return scenes.get(scene.seed ^ 1)


def mirror(pictures: PictureSet) -> PictureSet:
    """All pictures mirrored, left for right, which is a world as true as the other."""
    views = tuple(replace(view, boxes=_mirror_boxes(view.boxes, view.width)) for view in pictures.views)
    return replace(pictures, views=views, mirrored=not pictures.mirrored)


def _mirror_boxes(boxes: Sequence[Corners | None], width: int) -> tuple[Corners | None, ...]:
    return tuple(None if b is None else (width - b[2], b[1], width - b[0], b[3]) for b in boxes)
