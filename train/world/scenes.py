"""What a rendered scene is: things on a table, photographed by several cameras, before and after something changed.

A scene has four views: two cameras before the change, then the first of them and a third camera after it. Scenes 2k and
2k + 1 are relatives: other places, tables and lights, but some things of the same name and colour. Knows neither
pybullet nor questions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError

BEFORE, AFTER = (0, 1), (2, 3)  # the views of each moment
SAME_CAMERA = (0, 2)  # one camera's views of both moments
HELD_OUT_SEED = 1_000_000  # scenes nobody trains on, of the same names and tables
NEW_NAMES_SEED = 2_000_000  # held-out scenes with names that training never shows
NEW_STYLE_SEED = 3_000_000  # held-out scenes on a table and in a light that training never shows

Corners = tuple[float, float, float, float]
Thing = tuple[str, str]  # name and colour


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
    """The things of both moments, what happened to them between, and the four views."""

    seed: int
    things: tuple[Thing, ...]
    moved: tuple[int, ...]
    removed: tuple[int, ...]  # there before, gone after
    added: tuple[int, ...]  # there after only
    views: tuple[View, ...]


def read_scenes(folder: Path) -> list[Scene]:
    """All scenes of a rendered folder, by seed."""
    files = sorted(folder.glob("scenes-*.jsonl"))
    if not files:
        raise GemvgError(f"{folder} has no scenes-*.jsonl; render it with: python -m train.world.render {folder}")
    scenes = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                scenes.append(_from_json(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise GemvgError(f"{file}, line {number} is not a scene; delete the file and render again") from None
    return sorted(scenes, key=lambda scene: scene.seed)


def _from_json(record: dict[str, Any]) -> Scene:
    views = tuple(
        View(v["file"], v["width"], v["height"], tuple(None if b is None else tuple(b) for b in v["boxes"]))
        for v in record["views"]
    )
    things = tuple((name, colour) for name, colour in record["things"])
    moved, removed, added = (tuple(record[key]) for key in ("moved", "removed", "added"))
    return Scene(record["seed"], things, moved, removed, added, views)
