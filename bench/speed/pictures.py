"""Deterministic pictures of a scene each: a gradient, shapes and noise, as PNG files that every system reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = 12


def picture(work: Path, size: tuple[int, int], number: int) -> str:
    """The path of the picture of this number, (width, height) pixels; no two numbers share one."""
    file = work / "pictures" / f"{size[0]}x{size[1]}-{number}.png"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        draw(size, number).save(partial, "PNG")
        partial.rename(file)
    return str(file)


def draw(size: tuple[int, int], number: int) -> Image.Image:
    """The picture itself."""
    rng = np.random.default_rng(number)
    width, height = size
    ramp = np.linspace(0, 1, width)[None, :, None] * rng.integers(60, 160, 3)
    image = Image.fromarray(np.broadcast_to(ramp + 40, (height, width, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(SHAPES):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        w, h = (int(rng.integers(side // 16, side // 3)) for side in size)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape((x, y, x + w, y + h), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    pixels = np.asarray(image, np.int16) + rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
