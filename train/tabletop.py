"""Render the simulated tabletop world: named, coloured objects on a table, seen by several cameras.

    python -m train.tabletop data/tabletop --scenes 14000 --first-seed 0

Every scene comes from its own seed, so a split is a range of seeds: training counts up from 0, held-out scenes from
HELD_OUT_SEED. Truth is the renderer's own mask. An object is a target in a view with at least MIN_PIXELS_SHARE of the
picture showing; views that show less than that of an object (but not nothing) are drawn again, so truth is never a
toss-up. Knows nothing about queries or models. The folder gets one PNG a view and one `scenes-*.jsonl` line a scene.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from train.meshes import MESHES, write_obj

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
HELD_OUT_SEED = 1_000_000
MIN_PIXELS_SHARE = 1 / 450
SHAPES = ((1.0, 1.0), (4 / 3, 3 / 4), (3 / 4, 4 / 3))  # width and height as shares of the square root of the area
SHARD = 250  # scenes in one scenes-*.jsonl, the unit that is resumed


@dataclass(frozen=True)
class View:
    """One picture of a scene; `boxes[k]` is object k's box in its pixels (x1, y1, x2, y2), None where unseen."""

    file: str
    width: int
    height: int
    boxes: tuple[tuple[float, float, float, float] | None, ...]

    def box(self, k: int, image: int) -> Box | None:
        """Object k's box, with `image` as the index this view has in a prompt."""
        corners = self.boxes[k]
        return None if corners is None else Box(image, *corners)


@dataclass(frozen=True)
class TabletopScene:
    """One arrangement: (name, colour) of each object, and the views of it."""

    seed: int
    objects: tuple[tuple[str, str], ...]
    views: tuple[View, ...]


def read_scenes(folder: Path) -> list[TabletopScene]:
    """All scenes of a rendered folder, by seed."""
    files = sorted(folder.glob("scenes-*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder} has no scenes-*.jsonl; render it with: python -m train.tabletop {folder}")
    scenes = [_from_json(json.loads(line)) for file in files for line in file.read_text().splitlines()]
    return sorted(scenes, key=lambda scene: scene.seed)


def render(folder: Path, first_seed: int, scenes: int, cameras: int, size: int, processes: int) -> None:
    """Render seeds first_seed.. into the folder; shards that are already there are kept."""
    _claim(folder, {"cameras": cameras, "size": size})
    (folder / "images").mkdir(exist_ok=True)
    starts = range(first_seed, first_seed + scenes, SHARD)
    shards = [(start, min(SHARD, first_seed + scenes - start)) for start in starts]
    missing = [(start, count) for start, count in shards if _rendered(_shard_file(folder, start)) < count]
    if not missing:
        return
    work = partial(_render_shard, folder=folder, cameras=cameras, size=size)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in tqdm(pool.imap_unordered(work, missing), total=len(missing), desc="shards", unit="shard"):
            pass


def _claim(folder: Path, settings: dict[str, int]) -> None:
    """Refuse to mix scenes of other settings into a folder."""
    record = folder / "settings.json"
    if record.is_file() and (found := json.loads(record.read_text())) != settings:
        raise GemvgError(f"{folder} was rendered with {found}, not {settings}; give another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings))


def _shard_file(folder: Path, start: int) -> Path:
    return folder / f"scenes-{start:08d}.jsonl"


def _rendered(shard: Path) -> int:
    return len(shard.read_text().splitlines()) if shard.is_file() else 0


def _render_shard(shard: tuple[int, int], folder: Path, cameras: int, size: int) -> None:
    start, count = shard
    with _world() as world:
        lines = [
            json.dumps(asdict(_render_scene(world, seed, folder, cameras, size)))
            for seed in range(start, start + count)
        ]
    partial_file = _shard_file(folder, start).with_suffix(".partial")
    partial_file.write_text("\n".join(lines) + "\n")
    os.replace(partial_file, _shard_file(folder, start))


class _world:
    """A pybullet client and the folder of meshes it reads, both gone at the end."""

    def __enter__(self) -> _world:
        import pybullet

        self.bullet: Any = pybullet
        self.client = pybullet.connect(pybullet.DIRECT)
        self._folder = tempfile.TemporaryDirectory()
        self.meshes = Path(self._folder.name)
        for name, mesh in MESHES.items():
            write_obj(mesh, self.meshes / f"{name}.obj")
        return self

    def __exit__(self, *_: object) -> None:
        self.bullet.disconnect(self.client)
        self._folder.cleanup()


def _render_scene(world: _world, seed: int, folder: Path, cameras: int, size: int) -> TabletopScene:
    rng = np.random.default_rng(seed)
    while True:
        objects = _choose_objects(rng)
        bodies = _build(world, rng, objects)
        light = _light(rng)
        pictures = list(_photograph(world, rng, bodies, light, cameras, size))
        if len(pictures) == cameras:
            break
    views = []
    for k, (pixels, boxes) in enumerate(pictures):
        file = f"images/{seed:08d}-{k}.png"
        Image.fromarray(pixels).save(folder / file)
        views.append(View(file, pixels.shape[1], pixels.shape[0], boxes))
    return TabletopScene(seed, tuple(objects), tuple(views))


def _choose_objects(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Two to five objects; names and colours repeat often enough to confuse a guesser."""
    names, colours = list(MESHES), list(COLOURS)
    objects: list[tuple[str, str]] = []
    for _ in range(rng.integers(2, 6)):
        name, colour = str(rng.choice(names)), str(rng.choice(colours))
        if objects and rng.random() < 0.45:
            twin = objects[rng.integers(len(objects))]
            name, colour = (twin[0], colour) if rng.random() < 0.5 else (name, twin[1])
        objects.append((name, colour))
    return objects


def _build(world: _world, rng: np.random.Generator, objects: list[tuple[str, str]]) -> list[int]:
    """A floor, a table top at z = 0 and the objects standing on it; the objects' body ids."""
    p = world.bullet
    p.resetSimulation()
    for half, z, shade in (
        (3.0, -0.5, rng.uniform(0.15, 0.9, 3)),
        (rng.uniform(0.42, 0.6), -0.02, rng.uniform(0.25, 0.85, 3)),
    ):
        rgba = [*(shade.mean() + 0.45 * (shade - shade.mean())), 1]
        slab = p.createVisualShape(p.GEOM_BOX, halfExtents=[half, half, 0.02], rgbaColor=rgba)
        p.createMultiBody(0, -1, slab, [0, 0, z])
    places: list[np.ndarray[Any, Any]] = []
    while len(places) < len(objects):
        place = rng.uniform(-0.27, 0.27, 2)
        if all(np.hypot(*(place - other)) > 0.155 for other in places):
            places.append(place)
    bodies = []
    for (name, colour), (x, y) in zip(objects, places, strict=True):
        shade = np.clip(np.asarray(COLOURS[colour]) * rng.uniform(0.85, 1.1) + rng.uniform(-0.03, 0.03, 3), 0, 1)
        shape = p.createVisualShape(
            p.GEOM_MESH,
            fileName=str(world.meshes / f"{name}.obj"),
            rgbaColor=[*shade, 1],
            meshScale=[rng.uniform(0.9, 1.2)] * 3,
        )
        turn = p.getQuaternionFromEuler([0, 0, rng.uniform(0, 2 * np.pi)])
        bodies.append(p.createMultiBody(0, -1, shape, [x, y, 0], turn))
    return bodies


def _light(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "lightDirection": [*rng.uniform(-1.5, 1.5, 2), rng.uniform(1.5, 3)],
        "lightAmbientCoeff": rng.uniform(0.45, 0.65),
        "lightDiffuseCoeff": rng.uniform(0.3, 0.5),
        "lightSpecularCoeff": 0.05,
        "shadow": 1,
    }


def _photograph(
    world: _world, rng: np.random.Generator, bodies: list[int], light: dict[str, Any], cameras: int, size: int
) -> Iterator[tuple[Any, tuple[tuple[float, float, float, float] | None, ...]]]:
    """Up to `cameras` pictures (RGB uint8, boxes) from around the table; toss-ups are tried again a few times."""
    p = world.bullet
    start = rng.uniform(0, 360)
    for k in range(cameras):
        for _ in range(6):
            shape = SHAPES[rng.choice(3, p=[0.5, 0.3, 0.2])]
            width, height = (round(size * share**0.5) for share in shape)
            view = p.computeViewMatrixFromYawPitchRoll(
                [*rng.uniform(-0.1, 0.1, 2), 0.03],
                rng.uniform(0.85, 1.2),
                start + k * 360 / cameras + rng.uniform(-40, 40),
                rng.uniform(-62, -32),
                0,
                2,
            )
            lens = p.computeProjectionMatrixFOV(rng.uniform(36, 46), width / height, 0.05, 10)
            _, _, rgba, _, mask = p.getCameraImage(width, height, view, lens, renderer=p.ER_TINY_RENDERER, **light)
            boxes = _boxes_of(np.reshape(mask, (height, width)), bodies)
            if boxes is not None:
                yield np.reshape(rgba, (height, width, 4)).astype(np.uint8)[..., :3], boxes
                break


def _boxes_of(mask: Any, bodies: list[int]) -> tuple[tuple[float, float, float, float] | None, ...] | None:
    """Each body's box from the mask; None for the whole view if it shows too little of one, or nothing at all."""
    boxes: list[tuple[float, float, float, float] | None] = []
    for body in bodies:
        rows, columns = np.nonzero(mask == body)
        if not rows.size:
            boxes.append(None)
        elif rows.size < MIN_PIXELS_SHARE * mask.size:
            return None
        else:
            boxes.append((float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)))
    return tuple(boxes) if any(boxes) else None


def _from_json(record: dict[str, Any]) -> TabletopScene:
    views = tuple(
        View(v["file"], v["width"], v["height"], tuple(None if b is None else tuple(b) for b in v["boxes"]))
        for v in record["views"]
    )
    return TabletopScene(record["seed"], tuple((name, colour) for name, colour in record["objects"]), views)


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Render simulated tabletop scenes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=14_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--cameras", type=int, default=3)
    parser.add_argument("--size", type=int, default=192, help="square root of a picture's area in pixels")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    for flag in ("scenes", "cameras", "size", "processes"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1")
    try:
        render(args.folder, args.first_seed, args.scenes, args.cameras, args.size, args.processes)
    except GemvgError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
