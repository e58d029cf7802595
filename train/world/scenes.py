"""What a rendered scene is: things on a table, photographed by several cameras, before and after something changed.

A scene has four views: two cameras before the change, then the first of them and a third camera after it. Some have two
more cameras' before it. Scenes 2k and 2k + 1 are relatives: other places, tables and lights, but some things of the
same name and colour. Which tables and lights a scene has follows from its seed. Knows neither pybullet nor questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import parse_json
from train.data.annotations import MALFORMED, find_files, inside, numbers, read_size
from train.data.record import read_lines, whole

BEFORE, AFTER = (0, 1), (2, 3)  # the views of each moment
SAME_CAMERA = (0, 2)  # one camera's views of both moments
HELD_OUT_SEED = 1_000_000  # scenes nobody trains on, of the same names and tables
NEW_NAMES_SEED = 2_000_000  # held-out scenes with names that training never shows
NEW_STYLE_SEED = 3_000_000  # held-out scenes on a checkered table and in a light that training never shows
NEW_LIGHT_SEED = 4_000_000  # the light alone
CHECKERS_SEED = 5_000_000  # the table alone
PHOTOGRAPHS_SEED = 6_000_000  # held-out scenes on photographs that training never shows
MORE_CAMERAS_SEED = 7_000_000  # held-out scenes that four cameras took before the change
FURNISHED_SEED = 8_000_000  # held-out scenes with named furniture that training never shows (furniture.py)
MORE_CAMERAS = (0, 1, 4, 5)  # the views before the change, where there are more than two
MORE_CAMERAS_OF_FOUR = 1  # of every four scenes that are trained on, so many have them

Corners = tuple[float, float, float, float]
Thing = tuple[str, str]  # name and colour


class Style(NamedTuple):
    """What a scene's table and floor are made of, how they are lit, and how many cameras took them."""

    surface: Literal["plain", "varied", "checkers", "photographs"]
    light: Literal["plain", "varied", "new"]
    more_cameras: bool = False


def style_of(seed: int) -> Style:
    """The style of a scene; those below HELD_OUT_SEED are trained on, and the others show one thing that is not."""
    if seed < HELD_OUT_SEED:
        return Style("varied", "varied", seed // 2 % 4 < MORE_CAMERAS_OF_FOUR)
    for first, style in (
        (FURNISHED_SEED, Style("plain", "plain")),
        (MORE_CAMERAS_SEED, Style("plain", "plain", more_cameras=True)),
        (PHOTOGRAPHS_SEED, Style("photographs", "plain")),
        (CHECKERS_SEED, Style("checkers", "plain")),
        (NEW_LIGHT_SEED, Style("plain", "new")),
        (NEW_STYLE_SEED, Style("checkers", "new")),
    ):
        if seed >= first:
            return style
    return Style("plain", "plain")


@dataclass(frozen=True)
class View:
    """One picture of a scene; `boxes[k]` is thing k's box in its pixels (x1, y1, x2, y2), None where unseen."""

    file: str
    width: int
    height: int
    boxes: tuple[Corners | None, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    def box(self, k: int, image: int) -> Box | None:
        """Thing k's box, with `image` as the index this view has in a prompt."""
        corners = self.boxes[k]
        return None if corners is None else Box(image, *corners)


@dataclass(frozen=True)
class Scene:
    """The things of both moments, what happened to them between, and the four or six views."""

    seed: int
    things: tuple[Thing, ...]
    moved: tuple[int, ...]
    removed: tuple[int, ...]  # there before, gone after
    added: tuple[int, ...]  # there after only
    views: tuple[View, ...]

    @property
    def has_more_cameras(self) -> bool:
        """Whether four cameras took it before the change."""
        return len(self.views) > max(MORE_CAMERAS)


def read_scenes(folder: Path) -> list[Scene]:
    """All scenes of a rendered folder, by seed."""
    files = find_files(folder, "scenes-*.jsonl")
    if not files:
        raise GemvgError(f"{folder} has no scenes-*.jsonl; render it with: python -m train.world.render {folder}")
    scenes: dict[int, Scene] = {}
    for file in files:
        for number, line in read_lines(file):
            try:
                scene = _from_json(parse_json(line.decode("utf-8")))
            except (*MALFORMED, GemvgError):
                raise GemvgError(f"{file}, line {number} is not a scene; delete the file and render again") from None
            if scenes.setdefault(scene.seed, scene) != scene:
                raise GemvgError(f"{file}, line {number}: scene {scene.seed} stands twice; delete one and render again")
    return [scenes[seed] for seed in sorted(scenes)]


def _from_json(record: dict[str, Any]) -> Scene:
    things = tuple((_text(name), _text(colour)) for name, colour in record["things"])
    views = tuple(_view(view, len(things)) for view in record["views"])
    moved, removed, added = (
        tuple(_thing(k, len(things)) for k in record[key]) for key in ("moved", "removed", "added")
    )
    if len(views) not in (len(BEFORE + AFTER), len(MORE_CAMERAS + AFTER)) or (seed := whole(record["seed"])) < 0:
        raise ValueError("neither four nor six views, or no seed")
    return Scene(seed, things, moved, removed, added, views)


def _view(view: dict[str, Any], things: int) -> View:
    width, height = read_size(view)
    boxes = tuple(None if box is None else _corners(box, width, height) for box in view["boxes"])
    if len(boxes) != things or not any(boxes):
        raise ValueError("not one box a thing, or nothing in sight")
    inside(Path(), name := view["file"])
    return View(name, width, height, boxes)


def _corners(box: Any, width: int, height: int) -> Corners:
    x1, y1, x2, y2 = numbers(box, 4)
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError("a box outside its picture")
    return x1, y1, x2, y2


def _thing(number: Any, things: int) -> int:
    if not 0 <= whole(number) < things:
        raise ValueError("no such thing")
    return whole(number)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value
