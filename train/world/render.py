"""Render the simulated tabletop world: named things on a table, seen by several cameras, before and after a change.

    python -m train.world.render data/world/train --scenes 10000 --first-seed 0

Every scene comes from its own seed, so a split is a range of seeds (scenes.py), each with tables and lights of its own:
those that are trained on vary, with patterns and photographs (textures.py) on most tables and floors. Truth is the
renderer's own mask. A thing is a target in a view with at least MIN_PIXELS_SHARE of the picture showing; views that
show less than that of a thing (but not nothing) are taken again, so truth is never a toss-up. Knows nothing about
questions or models. The folder gets one PNG a view and one `scenes-*.jsonl` line a scene.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from gemvg_edge.command import TERMINATED, command, seed_number, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, replacing, sha256, unwritable, write_text
from gemvg_edge.json_object import read_json_object
from train.data.record import read_lines
from train.world.furniture import named, read_furniture
from train.world.scenes import HELD_OUT_SEED, Corners, Scene, Style, View, style_of
from train.world.staging import (
    World,
    add_clutter,
    add_furniture,
    draw_camera,
    draw_light,
    pattern_greys,
    place_things,
    set_table,
    stand,
)
from train.world.things import Plan, plan_scene

MIN_PIXELS_SHARE = 1 / 250
SHARD = 250  # scenes in one scenes-*.jsonl, the unit that is resumed
SIZES = (0.9, 1.35)  # of varied scenes' pictures, times the size that was asked for


def render(
    folder: Path, first_seed: int, scenes: int, size: int, processes: int, furniture: Path | None = None
) -> None:
    """Render seeds first_seed.. into the folder; shards that are already there are kept.

    `furniture` is a library of further things (furniture.py).
    """
    starts = range(first_seed, first_seed + scenes, SHARD)
    shards = [(start, min(SHARD, first_seed + scenes - start)) for start in starts]
    missing = [(start, count) for start, count in shards if _rendered(_shard_file(folder, start)) < count]
    if furniture and missing:
        read_furniture(furniture)  # its errors come before any process starts
    _claim(folder, {"size": size, "version": 3, **({"furniture": sha256(furniture)} if furniture else {})})
    if not missing:
        return
    work = partial(_render_shard, folder=folder, size=size, furniture=furniture)
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


def _claim(folder: Path, settings: dict[str, Any]) -> None:
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


def _render_shard(shard: tuple[int, int], folder: Path, size: int, furniture: Path | None) -> None:
    start, count = shard
    with _ending_cleanly(), World(read_furniture(furniture) if furniture else ()) as world:
        lines = [json.dumps(asdict(_render_scene(world, seed, folder, size))) for seed in range(start, start + count)]
    write_text(_shard_file(folder, start), "\n".join(lines) + "\n")


def _render_scene(world: World, seed: int, folder: Path, size: int) -> Scene:
    plan = plan_scene(seed, named(world.furniture.values(), held_out=seed >= HELD_OUT_SEED))
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
    world: World, rng: np.random.Generator, extra: np.random.Generator, plan: Plan, style: Style, size: int
) -> tuple[Picture, ...] | None:
    """The four or six views; None if the dice fell so that some view cannot be taken without a toss-up."""
    p = world.bullet
    p.resetSimulation()
    set_table(world, rng, extra, style)
    count = len(plan.things)
    places = place_things(rng, count + len(plan.moved))
    before = [k for k in range(count) if k not in plan.added]
    bodies = {k: stand(world, rng, plan.things[k], places[k]) for k in before}
    blocks = [add_clutter(p, rng, places) for _ in range(rng.integers(0, 3))]
    if style.surface == "varied":
        for _ in range(extra.integers(0, 3)):
            pattern_greys(world, add_clutter(p, extra, places), extra)
    if world.clutter:
        for _ in range(extra.integers(0, 3)):
            add_furniture(world, extra, places)
    light = draw_light(rng, extra, style)
    cameras = [draw_camera(rng, k * 120 + rng.uniform(0, 60)) for k in range(3)]
    pictures = [_take(p, cameras[k], light, bodies, count, size) for k in (0, 1)]
    if any(picture is None for picture in pictures):
        return None
    more: list[Picture | None] = []
    if style.more_cameras:
        others = (cameras[2], draw_camera(extra, extra.uniform(0, 360)))
        more = [_take(p, camera, light, bodies, count, size) for camera in others]
    for k in plan.removed:
        p.removeBody(bodies.pop(k))
    for k, place in zip(plan.moved, places[count:], strict=True):
        turn = p.getBasePositionAndOrientation(bodies[k])[1]
        height = p.getBasePositionAndOrientation(bodies[k])[0][2]
        p.resetBasePositionAndOrientation(bodies[k], [*place, height], turn)
    for k in plan.added:
        bodies[k] = stand(world, rng, plan.things[k], places[k])
    if blocks and rng.random() < 0.5:  # a changed light or shadow is not what a question means by a change
        light = draw_light(rng, extra, style)
    pictures += [_take(p, cameras[k], light, bodies, count, size) for k in (0, 2)] + more
    return None if any(picture is None for picture in pictures) else tuple(pictures)  # type: ignore[arg-type]


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
    furniture = "a Sweet Home 3D library of further things (default: none)"
    parser.add_argument("--furniture", type=Path, metavar="SH3F", help=furniture)
    args = parser.parse_args()
    for flag in ("scenes", "size", "processes"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1")
    render(args.folder, args.first_seed, args.scenes, args.size, args.processes or os.cpu_count() or 1, args.furniture)


if __name__ == "__main__":
    main()
