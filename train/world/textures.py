"""What lies on tables and floors of the simulated world: two-tone patterns of ours, and crops of photographs.

A pattern is one of 200 fixed fields of numbers, coloured anew in every scene. No grid of alternating squares is among
them: checkers are what the model is tested on and never trained with. Photographs are those that scikit-image and
scikit-learn ship as examples (licences: the docstrings of skimage.data, and sklearn/datasets/images/README.txt); none
is copied into this repository, and those of HELD_OUT_PHOTOGRAPHS are never shown in training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from gemvg_edge.errors import GemvgError

SIDE, PHOTOGRAPH_SIDE = 128, 320  # pixels of a pattern and of a photograph's part
PATTERNS = 200
PHOTOGRAPHS = (
    "skimage/data/astronaut.png",
    "skimage/data/camera.png",
    "skimage/data/chelsea.png",
    "skimage/data/coins.png",
    "skimage/data/gravel.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/ihc.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/retina.jpg",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/flower.jpg",
)
HELD_OUT_PHOTOGRAPHS = (
    "skimage/data/brick.png",
    "skimage/data/grass.png",
    "skimage/data/moon.png",
    "sklearn/datasets/images/china.jpg",
)
CONTRASTS = (0.1, 0.5)  # at least that between a pattern's two colours: mostly the first, often the second
STRONG_SHARE = 0.4

Field = npt.NDArray[np.float64]  # (SIDE, SIDE), 0 to 1
Texture = npt.NDArray[np.uint8]  # (side, side, 3), RGB


def pattern(number: int) -> Field:
    """One of the PATTERNS fields, always the same for a number."""
    rng = np.random.default_rng([number, 7])
    field = FAMILIES[number % len(FAMILIES)](rng)
    field = (field - field.min()) / max(1e-9, field.max() - field.min())
    oriented: Field = field if rng.random() < 0.5 else 1 - field
    return oriented


def colour_pattern(field: Field, rng: np.random.Generator, saturation: float = 0.45) -> Texture:
    """A field between two random colours; `saturation` is that of plain tables, 0 is grey."""
    least = CONTRASTS[int(rng.random() < STRONG_SHARE)]
    first, second = (_shade(rng, saturation) for _ in range(2))
    while abs(first.mean() - second.mean()) < least:
        first, second = (_shade(rng, saturation) for _ in range(2))
    mixed = first + field[..., None] * (second - first)
    return np.clip(mixed * 255, 0, 255).astype(np.uint8)


def _shade(rng: np.random.Generator, saturation: float) -> npt.NDArray[np.float64]:
    shade = rng.uniform(0.02, 0.98, 3) if rng.random() < 0.5 else np.full(3, rng.uniform(0.02, 0.98))
    grey: npt.NDArray[np.float64] = shade.mean() + saturation * (shade - shade.mean())
    return grey


def crop_photograph(rng: np.random.Generator, *, held_out: bool) -> Texture:
    """A random square of one of the photographs, turned and mirrored at random."""
    names = HELD_OUT_PHOTOGRAPHS if held_out else PHOTOGRAPHS
    picture = _open(names[rng.integers(len(names))])
    side = round(min(picture.size) * rng.uniform(0.3, 1))
    left, top = (int(rng.integers(whole - side + 1)) for whole in picture.size)
    cut = picture.resize((PHOTOGRAPH_SIDE,) * 2, Image.Resampling.BOX, (left, top, left + side, top + side))
    turned = np.rot90(np.asarray(cut), int(rng.integers(4)))
    return np.ascontiguousarray(turned[:, ::-1] if rng.random() < 0.5 else turned)


@lru_cache(maxsize=32)
def _open(name: str) -> Image.Image:
    package, _, inside = name.partition("/")
    found = find_spec(package)
    if found is None or not found.origin:
        wanted = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise GemvgError(f"textures need the photographs of {wanted}, which is not installed: pip install {wanted}")
    with Image.open(Path(found.origin).parent / inside) as picture:
        picture.draft("RGB", (512, 512))
        small = picture.convert("RGB")
    small.thumbnail((512, 512))
    return small


def _grid() -> tuple[Field, Field]:
    axis = np.arange(SIDE) / SIDE
    across, down = np.meshgrid(axis, axis)
    return across, down


def _noise(rng: np.random.Generator, cells: int) -> Field:
    """Smooth noise with about so many cells along a side."""
    small = Image.fromarray(rng.uniform(0, 1, (cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), float)


def _clouds(rng: np.random.Generator) -> Field:
    return sum((_noise(rng, int(n)) / n**0.7 for n in (3, 6, 12, 24, 48)), np.zeros((SIDE, SIDE)))


def _stripes(rng: np.random.Generator) -> Field:
    across, down = _grid()
    angle, period = rng.uniform(0, np.pi), rng.uniform(2, 14)
    wave = np.sin(2 * np.pi * period * (across * np.cos(angle) + down * np.sin(angle)) + rng.uniform(0, 6))
    return _harden(wave, rng)


def _waves(rng: np.random.Generator) -> Field:
    across, down = _grid()
    if rng.random() < 0.5:
        across, down = down, across
    bent = across + rng.uniform(0.02, 0.12) * np.sin(2 * np.pi * rng.uniform(1, 5) * down)
    return _harden(np.sin(2 * np.pi * rng.uniform(3, 10) * bent), rng)


def _harden(wave: Field, rng: np.random.Generator) -> Field:
    """A wave as it is, or cut into two tones."""
    return (wave > rng.uniform(-0.6, 0.6)).astype(float) if rng.random() < 0.7 else wave


def _dots(rng: np.random.Generator) -> Field:
    across, down = _grid()
    field = np.zeros((SIDE, SIDE))
    radius = rng.uniform(0.02, 0.1)
    for x, y in rng.uniform(0, 1, (int(rng.integers(8, 60)), 2)):
        field[np.hypot(across - x, down - y) < radius * rng.uniform(0.6, 1.3)] = 1
    return field


def _blotches(rng: np.random.Generator) -> Field:
    noise = _noise(rng, int(rng.integers(2, 7)))
    return (noise > np.quantile(noise, rng.uniform(0.3, 0.7))).astype(float)


def _wood(rng: np.random.Generator) -> Field:
    across, down = _grid()
    bent = across * rng.uniform(4, 12) + _noise(rng, 3) * rng.uniform(0.5, 2) + 0.2 * down
    return np.sin(2 * np.pi * bent) + 0.5 * _noise(rng, 40)


def _cells(rng: np.random.Generator) -> Field:
    across, down = _grid()
    points = rng.uniform(0, 1, (int(rng.integers(6, 40)), 2))
    distances = np.hypot(across[..., None] - points[:, 0], down[..., None] - points[:, 1])
    tones = rng.uniform(0, 1, len(points)) if rng.random() < 0.5 else rng.integers(0, 2, len(points)).astype(float)
    nearest: Field = tones[distances.argmin(axis=2)]
    return nearest


def _shapes(rng: np.random.Generator) -> Field:
    """A few large shapes of one tone on the other: discs, bars and triangles."""
    across, down = _grid()
    field = np.zeros((SIDE, SIDE))
    for _ in range(int(rng.integers(2, 8))):
        x, y, size = *rng.uniform(0, 1, 2), rng.uniform(0.08, 0.35)
        angle = rng.uniform(0, np.pi)
        u = (across - x) * np.cos(angle) + (down - y) * np.sin(angle)
        v = (down - y) * np.cos(angle) - (across - x) * np.sin(angle)
        kind = rng.integers(3)
        inside = np.hypot(u, v) < size if kind == 0 else np.maximum(abs(u), 2 * abs(v)) < size
        field[(u > -size) & (u + 2 * abs(v) < size) if kind == 2 else inside] = rng.uniform(0.6, 1)
    return field


def _planks(rng: np.random.Generator) -> Field:
    """Planks or tiles of nearly one tone with dark lines between."""
    across, down = _grid()
    if rng.random() < 0.5:
        across, down = down, across
    rows = int(rng.integers(3, 9))
    row = (down * rows).astype(int)
    shifted = across + rng.uniform(0, 1, rows + 1)[row]
    length = rng.uniform(1, 4)
    tone = rng.uniform(0.6, 1, (rows + 1, 8))[row, (shifted * length).astype(int) % 8]
    seam = (down * rows % 1 < 0.08) | (shifted * length % 1 < 0.03)
    return np.where(seam, 0, tone) + 0.2 * _noise(rng, 30)


def _rings(rng: np.random.Generator) -> Field:
    across, down = _grid()
    x, y = rng.uniform(-0.2, 1.2, 2)
    return _harden(np.sin(2 * np.pi * rng.uniform(3, 12) * np.hypot(across - x, down - y)), rng)


def _speckles(rng: np.random.Generator) -> Field:
    small = _noise(rng, int(rng.integers(24, 60)))
    return (small > np.quantile(small, rng.uniform(0.5, 0.9))).astype(float)


def _slope(rng: np.random.Generator) -> Field:
    across, down = _grid()
    angle = rng.uniform(0, 2 * np.pi)
    slope: Field = across * np.cos(angle) + down * np.sin(angle)
    return slope + 0.3 * _noise(rng, 4)


FAMILIES: tuple[Callable[[np.random.Generator], Field], ...] = (
    _blotches, _shapes, _stripes, _cells, _clouds, _waves, _planks, _dots, _wood, _rings, _speckles, _slope,
)  # fmt: skip
