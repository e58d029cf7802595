"""What stands in a scene of the simulated world: floor, table, things, clutter, lights and cameras, in pybullet.

Everything is drawn from dice that are given; what varied scenes have beside the plain ones has dice of its own, so that
plain scenes stay what they always were. Knows nothing about pictures and truth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gemvg_edge.files import unwritable
from train.world.furniture import Furniture, write_furniture
from train.world.meshes import BORROWED, MESHES, borrow_mesh, data_file, write_obj
from train.world.scenes import Style, Thing
from train.world.textures import PATTERNS, Field, Texture, colour_pattern, crop_photograph, pattern
from train.world.things import COLOURS, TEXTURED

SHAPES = ((1.0, 1.0), (4 / 3, 3 / 4), (3 / 4, 4 / 3))  # width and height as shares of the square root of the area
MESH_SCALE = 1.25
TEXTURED_TABLES, TEXTURED_FLOORS, PHOTOGRAPH_SHARE = 0.75, 0.5, 0.3  # of varied scenes; photographs: of the textures
MOST_TILES = 3  # along a side of a patterned texture, which covers two metres
REACH, APART = 0.28, 0.17  # metres: how far from the middle things stand, and how far from each other


class World:
    """A pybullet client and the folder of meshes it reads, both gone at the end; `furniture` may stand in it too."""

    def __init__(self, furniture: Sequence[Furniture] = ()) -> None:
        self.furniture = {model.name: model for model in furniture}
        self.clutter = [model.name for model in furniture if not model.colour]

    def __enter__(self) -> World:
        import pybullet

        self.bullet: Any = pybullet
        self.client = pybullet.connect(pybullet.DIRECT)
        self._folder = tempfile.TemporaryDirectory()
        self.folder, self.numbers = self._folder.name, count()
        self.files: dict[str, str] = {}
        try:
            for name, mesh in MESHES.items():
                file = Path(self.folder, f"{name}.obj")
                write_obj(mesh, file)
                self.files[name] = str(file)
            for name in BORROWED:
                self.files[name] = borrow_mesh(name, Path(self.folder))
        except OSError as error:
            raise unwritable(Path(self.folder), error) from None
        return self

    def mesh_file(self, name: str) -> str:
        """The file of a thing's mesh; that of furniture is written when it is first asked for."""
        if name not in self.files:
            try:
                self.files[name] = write_furniture(
                    self.furniture[name], Path(self.folder), f"furniture-{next(self.numbers)}"
                )
            except OSError as error:
                raise unwritable(Path(self.folder), error) from None
        return self.files[name]

    def __exit__(self, *_: object) -> None:
        self.bullet.disconnect(self.client)
        self._folder.cleanup()


def place_things(rng: np.random.Generator, count: int) -> list[Any]:
    """Points on the table, apart from each other; a thing that moves has two."""
    places: list[Any] = []
    for _ in range(2000):
        place = rng.uniform(-REACH, REACH, 2)
        if all(np.hypot(*(place - other)) > APART for other in places):
            places.append(place)
            if len(places) == count:
                return places
    return place_things(rng, count)


def set_table(world: World, rng: np.random.Generator, extra: np.random.Generator, style: Style) -> None:
    """A floor and a table top at z = 0."""
    p = world.bullet
    for half, z, shade in (
        (3.0, -0.5, rng.uniform(0.15, 0.9, 3)),
        (rng.uniform(0.42, 0.6), -0.02, rng.uniform(0.25, 0.85, 3)),
    ):
        rgba = [*(shade.mean() + 0.45 * (shade - shade.mean())), 1]
        slab = p.createVisualShape(p.GEOM_BOX, halfExtents=[half, half, 0.02], rgbaColor=rgba)
        body = p.createMultiBody(0, -1, slab, [0, 0, z])
        is_table = z > -0.1
        if style.surface == "checkers" and is_table:
            p.changeVisualShape(body, -1, textureUniqueId=p.loadTexture(str(data_file("checker_grid.jpg"))))
        elif style.surface == "photographs" and is_table:
            lay_texture(world, body, crop_photograph(extra, held_out=True))
        elif style.surface == "varied" and extra.random() < (TEXTURED_TABLES if is_table else TEXTURED_FLOORS):
            lay_texture(world, body, _any_texture(extra))


def _any_texture(rng: np.random.Generator) -> Texture:
    if rng.random() < PHOTOGRAPH_SHARE:
        return crop_photograph(rng, held_out=False)
    times = int(rng.integers(1, MOST_TILES + 1))
    return np.tile(colour_pattern(_any_pattern(rng), rng), (times, times, 1))


def _any_pattern(rng: np.random.Generator) -> Field:
    return pattern(int(rng.integers(PATTERNS)))


def pattern_greys(world: World, body: int, rng: np.random.Generator) -> None:
    """A pattern without a colour, for what no question is about."""
    lay_texture(world, body, colour_pattern(_any_pattern(rng), rng, saturation=0))


def lay_texture(world: World, body: int, texture: Texture) -> None:
    """Put a texture on a body, in its own colours."""
    file = Path(world.folder, f"texture-{next(world.numbers)}.png")  # pybullet reads a file of one name once
    Image.fromarray(texture).save(file, compress_level=0)
    number = world.bullet.loadTexture(str(file))
    file.unlink()
    world.bullet.changeVisualShape(body, -1, textureUniqueId=number, rgbaColor=[1, 1, 1, 1])


def stand(world: World, rng: np.random.Generator, thing: Thing, place: Any) -> int:
    """Put a thing on the table; its body's id."""
    p = world.bullet
    name, colour = thing
    scale = rng.uniform(0.9, 1.15) * MESH_SCALE
    look: dict[str, Any] = {}
    if name not in TEXTURED and name not in world.furniture:
        shade = np.asarray(COLOURS[colour]) * rng.uniform(0.85, 1.1) + rng.uniform(-0.03, 0.03, 3)
        look["rgbaColor"] = [*np.clip(shade, 0, 1), 1]
    shape = p.createVisualShape(p.GEOM_MESH, fileName=world.mesh_file(name), meshScale=[scale] * 3, **look)
    yaw = rng.uniform(0, 2 * np.pi)
    return int(p.createMultiBody(0, -1, shape, [*place, 0], p.getQuaternionFromEuler([0, 0, yaw])))


def _between(rng: np.random.Generator, places: list[Any]) -> Any:
    while True:
        place = rng.uniform(-REACH - 0.1, REACH + 0.1, 2)
        if all(np.hypot(*(place - other)) > APART * 0.6 for other in places):
            return place


def add_clutter(p: Any, rng: np.random.Generator, places: list[Any]) -> int:
    """A grey block that nobody asks for, somewhere between the things; it may hide one."""
    half = rng.uniform(0.015, 0.04, 3)
    shape = p.createVisualShape(p.GEOM_BOX, halfExtents=[*half], rgbaColor=[*[rng.uniform(0.3, 0.6)] * 3, 1])
    place = _between(rng, places)
    yaw = p.getQuaternionFromEuler([0, 0, rng.uniform(0, np.pi)])
    return int(p.createMultiBody(0, -1, shape, [*place, half[2]], yaw))


def add_furniture(world: World, rng: np.random.Generator, places: list[Any]) -> None:
    """Furniture that nobody asks for, somewhere between the things."""
    name = world.clutter[rng.integers(len(world.clutter))]
    stand(world, rng, (name, ""), _between(rng, places))


def draw_light(rng: np.random.Generator, extra: np.random.Generator, style: Style) -> dict[str, Any]:
    """Where the light comes from and how strong it is, as pybullet's camera takes it."""
    sideways, ambient = (3.0, (0.25, 0.35)) if style.light == "new" else (1.5, (0.45, 0.65))
    light = {
        "lightDirection": [*rng.uniform(-sideways, sideways, 2), rng.uniform(1.5, 3)],
        "lightAmbientCoeff": rng.uniform(*ambient),
        "lightDiffuseCoeff": rng.uniform(0.3, 0.5),
        "lightSpecularCoeff": 0.05,
        "shadow": 1,
    }
    if style.light == "varied":  # as wide as can be without the new light's own range
        low = [*extra.uniform(-2.2, 2.2, 2), extra.uniform(1.2, 3)]
        light |= {"lightDirection": low, "lightAmbientCoeff": extra.uniform(0.36, 0.7)}
        light |= {"lightDiffuseCoeff": extra.uniform(0.25, 0.6), "lightSpecularCoeff": extra.uniform(0, 0.15)}
    return light


def draw_camera(rng: np.random.Generator, yaw: float) -> dict[str, Any]:
    """Where a camera stands; one in four is so near that some things may be out of its picture."""
    near = rng.random() < 0.25
    return {
        "target": [*rng.uniform(-0.12, 0.12, 2), 0.03] if near else [*rng.uniform(-0.05, 0.05, 2), 0.03],
        "distance": rng.uniform(0.62, 0.8) if near else rng.uniform(0.85, 1.1),
        "yaw": yaw,
        "pitch": rng.uniform(-62, -32),
        "fov": rng.uniform(36, 46),
        "shape": SHAPES[rng.choice(3, p=[0.6, 0.25, 0.15])],
    }
