"""Render the simulated tabletop world: named things on a table, seen by several cameras, before and after a change.

    python -m train.world.render data/world/train --scenes 10000 --first-seed 0

Every scene comes from its own seed, so a split is a range of seeds (scenes.py), each with tables and lights of its own:
those that are trained on vary, with patterns and photographs (textures.py) on most tables and floors. Truth is the renderer's own mask. A
thing is a target in a view with at least MIN_PIXELS_SHARE of the picture showing; views that show less than that of a
thing (but not nothing) are taken again, so truth is never a toss-up. Knows nothing about questions or models. The
folder gets one PNG a view and one `scenes-*.jsonl` line a scene.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from gemvg_edge.command import TERMINATED, command, seed_number, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, replacing, unwritable, write_text
from gemvg_edge.json_object import read_json_object
from train.data.record import read_lines
from train.world.meshes import BORROWED, MESHES, borrow_mesh, data_file, write_obj
from train.world.scenes import Corners, Scene, Style, Thing, View, style_of
from train.world.textures import PATTERNS, Texture, colour_pattern, crop_photograph, pattern
from train.world.things import COLOURS, TEXTURED, Plan, plan_scene

MIN_PIXELS_SHARE = 1 / 250
SHAPES = ((1.0, 1.0), (4 / 3, 3 / 4), (3 / 4, 4 / 3))  # width and height as shares of the square root of the area
SHARD = 250  # scenes in one scenes-*.jsonl, the unit that is resumed
MESH_SCALE = 1.25
SIZES = (0.9, 1.35)  # of varied scenes' pictures, times the size that was asked for
TEXTURED_TABLES, TEXTURED_FLOORS, PHOTOGRAPH_SHARE = 0.75, 0.5, 0.3  # of varied scenes; photographs: of the textures
MOST_TILES = 3  # along a side of a patterned texture, which covers two metres
REACH, APART = 0.28, 0.17  # metres: how far from the middle things stand, and how far from each other


def render(folder: Path, first_seed: int, scenes: int, size: int, processes: int) -> None:
    """Render seeds first_seed.. into the folder; shards that are already there are kept."""
    _claim(folder, {"size": size, "version": 3})
    starts = range(first_seed, first_seed + scenes, SHARD)
    shards = [(start, min(SHARD, first_seed + scenes - start)) for start in starts]
    missing = [(start, count) for start, count in shards if _rendered(_shard_file(folder, start)) < count]
    if not missing:
        return
    work = partial(_render_shard, folder=folder, size=size)
    with _start_pool(processes) as pool:
        for _ in tqdm(pool.imap_unordered(work, missing), total=len(missing), desc="shards", unit="shard"):
            pass


def _start_pool(processes: int) -> Any:
    """Processes that leave an interrupt to this one, which ends them: each would print a traceback of its own."""
    spawn = multiprocessing.get_context("spawn")
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        return spawn.Pool(processes)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # children inherit what is ignored
    try:
        return spawn.Pool(processes)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """In a process of the pool, while it works: being ended must not leave its folder of meshes behind.

    Not while it waits for work: a handler in Python may then never run (a signal just before the semaphore's own wait
    wakes nobody), and the pool would wait for this process for ever.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _claim(folder: Path, settings: dict[str, int]) -> None:
    """Refuse to mix scenes of other settings into a folder."""
    record = folder / "settings.json"
    if is_file(record):
        found = read_json_object(record, "give another folder or delete it", "").content
        if found != settings:
            raise GemvgError(f"{folder} was rendered with {found}, not {settings}; give another folder or delete it")
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise unwritable(folder, error) from None
    write_text(record, json.dumps(settings))


def _shard_file(folder: Path, start: int) -> Path:
    return folder / f"scenes-{start:08d}.jsonl"


def _rendered(shard: Path) -> int:
    """How many scenes a shard has; it takes its place when it and all its pictures are written."""
    return len(list(read_lines(shard))) if is_file(shard) else 0


def _render_shard(shard: tuple[int, int], folder: Path, size: int) -> None:
    start, count = shard
    with _ending_cleanly(), _World() as world:
        lines = [json.dumps(asdict(_render_scene(world, seed, folder, size))) for seed in range(start, start + count)]
    write_text(_shard_file(folder, start), "\n".join(lines) + "\n")


class _World:
    """A pybullet client and the folder of meshes it reads, both gone at the end."""

    def __enter__(self) -> _World:
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

    def __exit__(self, *_: object) -> None:
        self.bullet.disconnect(self.client)
        self._folder.cleanup()


def _render_scene(world: _World, seed: int, folder: Path, size: int) -> Scene:
    plan = plan_scene(seed)
    rng = np.random.default_rng([seed, 2])
    # What varied scenes have beside the plain ones is drawn apart, so that plain ones stay what they always were.
    extra = np.random.default_rng([seed, 5])
    style = style_of(seed)
    if style.surface == "varied":
        size = round(size * extra.uniform(*SIZES))
    while (shot := _photograph(world, rng, extra, plan, style, size)) is None:
        pass
    views = []
    for k, (pixels, boxes) in enumerate(shot):
        file = f"images/{seed:08d}-{k}.png"
        with replacing(folder / file) as partial_file:
            Image.fromarray(pixels).save(partial_file, compress_level=1)
        views.append(View(file, pixels.shape[1], pixels.shape[0], boxes))
    return Scene(seed, plan.things, plan.moved, plan.removed, plan.added, tuple(views))


Picture = tuple[Any, tuple[Corners | None, ...]]  # RGB uint8 (height, width, 3), and each thing's box


def _photograph(
    world: _World, rng: np.random.Generator, extra: np.random.Generator, plan: Plan, style: Style, size: int
) -> tuple[Picture, ...] | None:
    """The four or six views; None if the dice fell so that some view cannot be taken without a toss-up."""
    p = world.bullet
    p.resetSimulation()
    _table(world, rng, extra, style)
    count = len(plan.things)
    places = _places(rng, count + len(plan.moved))
    before = [k for k in range(count) if k not in plan.added]
    bodies = {k: _stand(world, rng, plan.things[k], places[k]) for k in before}
    clutter = [_clutter(p, rng, places) for _ in range(rng.integers(0, 3))]
    if style.surface == "varied":
        for _ in range(extra.integers(0, 3)):
            lay_texture(world, _clutter(p, extra, places), colour_pattern(_any_pattern(extra), extra, saturation=0))
    light = _light(rng, extra, style)
    cameras = [_camera(rng, k * 120 + rng.uniform(0, 60)) for k in range(3)]
    pictures = [_take(p, cameras[k], light, bodies, count, size) for k in (0, 1)]
    if any(picture is None for picture in pictures):
        return None
    more: list[Picture | None] = []
    if style.more_cameras:
        others = (cameras[2], _camera(extra, extra.uniform(0, 360)))
        more = [_take(p, camera, light, bodies, count, size) for camera in others]
    for k in plan.removed:
        p.removeBody(bodies.pop(k))
    for k, place in zip(plan.moved, places[count:], strict=True):
        turn = p.getBasePositionAndOrientation(bodies[k])[1]
        height = p.getBasePositionAndOrientation(bodies[k])[0][2]
        p.resetBasePositionAndOrientation(bodies[k], [*place, height], turn)
    for k in plan.added:
        bodies[k] = _stand(world, rng, plan.things[k], places[k])
    if clutter and rng.random() < 0.5:  # a changed light or shadow is not what a question means by a change
        light = _light(rng, extra, style)
    pictures += [_take(p, cameras[k], light, bodies, count, size) for k in (0, 2)] + more
    return None if any(picture is None for picture in pictures) else tuple(pictures)  # type: ignore[arg-type]


def _places(rng: np.random.Generator, count: int) -> list[Any]:
    """Points on the table, apart from each other; a thing that moves has two."""
    places: list[Any] = []
    for _ in range(2000):
        place = rng.uniform(-REACH, REACH, 2)
        if all(np.hypot(*(place - other)) > APART for other in places):
            places.append(place)
            if len(places) == count:
                return places
    return _places(rng, count)


def _table(world: _World, rng: np.random.Generator, extra: np.random.Generator, style: Style) -> None:
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


def _any_pattern(rng: np.random.Generator) -> Any:
    return pattern(int(rng.integers(PATTERNS)))


def lay_texture(world: _World, body: int, texture: Texture) -> None:
    """Put a texture on a body, in its own colours."""
    file = Path(world.folder, f"texture-{next(world.numbers)}.png")  # pybullet reads a file of one name once
    Image.fromarray(texture).save(file, compress_level=0)
    number = world.bullet.loadTexture(str(file))
    file.unlink()
    world.bullet.changeVisualShape(body, -1, textureUniqueId=number, rgbaColor=[1, 1, 1, 1])


def _stand(world: _World, rng: np.random.Generator, thing: Thing, place: Any) -> int:
    """Put a thing on the table; its body's id."""
    p = world.bullet
    name, colour = thing
    scale = rng.uniform(0.9, 1.15) * MESH_SCALE
    look: dict[str, Any] = {}
    if name not in TEXTURED:
        shade = np.asarray(COLOURS[colour]) * rng.uniform(0.85, 1.1) + rng.uniform(-0.03, 0.03, 3)
        look["rgbaColor"] = [*np.clip(shade, 0, 1), 1]
    shape = p.createVisualShape(p.GEOM_MESH, fileName=world.files[name], meshScale=[scale] * 3, **look)
    yaw = rng.uniform(0, 2 * np.pi)
    return int(p.createMultiBody(0, -1, shape, [*place, 0], p.getQuaternionFromEuler([0, 0, yaw])))


def _clutter(p: Any, rng: np.random.Generator, places: list[Any]) -> int:
    """A grey block that nobody asks for, somewhere between the things; it may hide one."""
    half = rng.uniform(0.015, 0.04, 3)
    shape = p.createVisualShape(p.GEOM_BOX, halfExtents=[*half], rgbaColor=[*[rng.uniform(0.3, 0.6)] * 3, 1])
    while True:
        place = rng.uniform(-REACH - 0.1, REACH + 0.1, 2)
        if all(np.hypot(*(place - other)) > APART * 0.6 for other in places):
            break
    yaw = p.getQuaternionFromEuler([0, 0, rng.uniform(0, np.pi)])
    return int(p.createMultiBody(0, -1, shape, [*place, half[2]], yaw))


def _light(rng: np.random.Generator, extra: np.random.Generator, style: Style) -> dict[str, Any]:
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


def _camera(rng: np.random.Generator, yaw: float) -> dict[str, Any]:
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


def _take(
    p: Any, camera: dict[str, Any], light: dict[str, Any], bodies: dict[int, int], count: int, size: int
) -> Picture | None:
    """One picture, or None if it would be a toss-up."""
    width, height = (round(size * share**0.5) for share in camera["shape"])
    view = p.computeViewMatrixFromYawPitchRoll(
        camera["target"], camera["distance"], camera["yaw"], camera["pitch"], 0, 2
    )
    lens = p.computeProjectionMatrixFOV(camera["fov"], width / height, 0.05, 10)
    _, _, rgba, _, mask = p.getCameraImage(width, height, view, lens, renderer=p.ER_TINY_RENDERER, **light)
    boxes = boxes_of(np.reshape(mask, (height, width)), bodies, count)
    return None if boxes is None else (np.reshape(rgba, (height, width, 4)).astype(np.uint8)[..., :3], boxes)


def boxes_of(mask: Any, bodies: dict[int, int], count: int) -> tuple[Corners | None, ...] | None:
    """Each thing's box from the mask (height, width) of body ids; None for the whole view if it shows too little of
    one thing, or nothing at all.
    """
    boxes: list[Corners | None] = [None] * count
    for k, body in bodies.items():
        rows, columns = np.nonzero(mask == body)
        if rows.size and rows.size < MIN_PIXELS_SHARE * mask.size:
            return None
        if rows.size:
            boxes[k] = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
    return tuple(boxes) if any(boxes) else None


@command("train.world.render")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.world.render", description="Render simulated tabletop scenes.")
    parser.add_argument("folder", type=Path, help="the folder to render into; scenes that are there are kept")
    scenes = "how many scenes, of four pictures each (default: %(default)s)"
    parser.add_argument("--scenes", type=whole_number, metavar="N", default=10_000, help=scenes)
    first = "the first scene's seed; the others follow (default: %(default)s)"
    parser.add_argument("--first-seed", type=seed_number, metavar="N", default=0, help=first)
    size = "square root of a picture's area, in pixels (default: %(default)s)"
    parser.add_argument("--size", type=whole_number, metavar="N", default=144, help=size)
    processes = "how many processes render (default: one a processor core)"
    parser.add_argument("--processes", type=whole_number, metavar="N", help=processes)
    args = parser.parse_args()
    for flag in ("scenes", "size", "processes"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1")
    render(args.folder, args.first_seed, args.scenes, args.size, args.processes or os.cpu_count() or 1)


if __name__ == "__main__":
    main()
