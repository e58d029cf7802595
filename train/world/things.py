"""Which things stand on the tables, and how a scene's things and their change are drawn from its seed.

Ten turned and built meshes of ours, plus a few of pybullet_data's. Names of HELD_OUT_NAMES are never shown in
training: they tell whether a model can follow a thing that it has no word for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from train.world.meshes import BORROWED, MESHES
from train.world.scenes import NEW_NAMES_SEED, NEW_STYLE_SEED, Thing

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.82, 0.1, 0.1),
    "orange": (0.95, 0.45, 0.05),
    "yellow": (0.93, 0.83, 0.1),
    "green": (0.12, 0.58, 0.18),
    "blue": (0.12, 0.25, 0.8),
    "purple": (0.5, 0.15, 0.62),
    "white": (0.95, 0.95, 0.95),
    "black": (0.07, 0.07, 0.08),
}
TEXTURED = {"duck": "yellow"}  # things that come with their own paint, and what one calls its colour
HELD_OUT_NAMES = ("teddy", "bunny")
NAMES = (*MESHES, *(name for name in BORROWED if name not in HELD_OUT_NAMES))
FEWEST, MOST = 2, 5
NO_CHANGE_SHARE = 0.08
TWO_CHANGES_SHARE = 0.25
FURNITURE_SHARE = 0.4  # of a furnished scene's things that are drawn anew


@dataclass(frozen=True)
class Plan:
    """A scene before it is built: its things and what changes."""

    things: tuple[Thing, ...]
    moved: tuple[int, ...]
    removed: tuple[int, ...]
    added: tuple[int, ...]


def plan_scene(seed: int, furniture: Mapping[str, str] | None = None) -> Plan:
    """Things and change of a scene, from its seed alone; odd seeds borrow things from the even seed before.

    `furniture` are further names, each with the one colour it has (furniture.named).
    """
    furniture = furniture or {}
    rng = np.random.default_rng([seed, 1])
    names = list(NAMES)
    if NEW_NAMES_SEED <= seed < NEW_STYLE_SEED:
        names += [*HELD_OUT_NAMES] * 3
    lent = plan_scene(seed - 1, furniture).things if seed % 2 else ()
    things: list[Thing] = []
    wanted = int(rng.integers(FEWEST, MOST + 1))
    while len(things) < wanted:
        borrow = rng.random() < 0.6 and bool(lent) and len(things) < 2
        thing = lent[rng.integers(len(lent))] if borrow else _draw(rng, names, furniture, things)
        things.append(thing)
    moved, removed = _change(rng, len(things))
    added: tuple[int, ...] = ()
    if rng.random() < 0.3 and len(moved) + len(removed) < 2:
        added = (len(things),)
        things.append(_draw(rng, names, furniture, things))
    return Plan(tuple(things), moved, removed, added)


def _draw(rng: np.random.Generator, names: list[str], furniture: Mapping[str, str], others: list[Thing]) -> Thing:
    """A thing; its name or colour repeats another's often enough to confuse a guesser."""
    name, colour = str(rng.choice(names)), str(rng.choice(list(COLOURS)))
    if others and rng.random() < 0.45:
        twin = others[rng.integers(len(others))]
        if rng.random() < 0.5:
            name = twin[0]
        else:
            colour = twin[1]
    if furniture and rng.random() < FURNITURE_SHARE:
        name = str(rng.choice(list(furniture)))
    return name, {**TEXTURED, **furniture}.get(name, colour)


def _change(rng: np.random.Generator, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of the things move and which are taken away."""
    if rng.random() < NO_CHANGE_SHARE:
        return (), ()
    chosen = [int(k) for k in rng.permutation(count)[: 2 if rng.random() < TWO_CHANGES_SHARE else 1]]
    takes = rng.random(len(chosen)) < 0.4
    moved = tuple(sorted(k for k, taken in zip(chosen, takes, strict=True) if not taken))
    removed = tuple(sorted(k for k, taken in zip(chosen, takes, strict=True) if taken))
    return moved, removed if len(removed) < count else removed[1:]  # an empty table cannot be photographed
