"""The pictures' part of bundle_runtime.py: pixels -> what the vision graph takes, by BUNDLE.md alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray


def new_size(width: int, height: int, numbers: dict[str, Any]) -> tuple[int, int]:
    f, most, least = numbers["patch_size"] * numbers["merge_size"], numbers["max_pixels"], numbers["min_pixels"]
    w, h = round(width / f) * f, round(height / f) * f
    if w * h > most:
        b = math.sqrt(width * height / most)
        w, h = (max(f, math.floor(side / b / f) * f) for side in (width, height))
    elif w * h < least:
        b = math.sqrt(least / (width * height))
        w, h = (math.ceil(side * b / f) * f for side in (width, height))
    return w, h


def resize(pixels: Array, w: int, h: int, pillow: int) -> Array:
    """As this version of Pillow does it."""
    height, width = pixels.shape[:2]
    if pillow >= 13 and h < height and height - h > 2 * (width - w):
        return across(one_way(pixels, h), w)
    return one_way(across(pixels, w), h)


def across(pixels: Array, w: int) -> Array:
    return one_way(pixels.transpose(1, 0, 2), w).transpose(1, 0, 2)


def one_way(pixels: Array, m: int) -> Array:
    """(n, others, 3) -> (m, others, 3)."""
    n = len(pixels)
    if n == m:
        return pixels
    s = n / m
    q = max(s, 1.0)
    out = np.empty((m, *pixels.shape[1:]), np.uint8)
    for i in range(m):
        c = (i + 0.5) * s
        first, end = max(0, int(c - 2 * q + 0.5)), min(n, int(c + 2 * q + 0.5))
        weights = [cubic((j - c + 0.5) / q) for j in range(first, end)]
        whole = [int(2**22 * weight / sum(weights) + math.copysign(0.5, weight)) for weight in weights]
        total = np.tensordot(np.array(whole), pixels[first:end].astype(np.int64), 1)
        out[i] = np.clip((2**21 + total) >> 22, 0, 255)
    return out


def cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def to_patches(pixels: Array, numbers: dict[str, Any]) -> Array:
    """A loop where the runtime has reshapes."""
    p, m = numbers["patch_size"], numbers["merge_size"]
    mean, std = (np.array(numbers[name], np.float32) for name in ("image_mean", "image_std"))
    normal = ((pixels * numbers["rescale_factor"]).astype(np.float32) - mean) / std
    rows = []
    for y, x in patch_order(len(pixels) // p, pixels.shape[1] // p, m):
        patch = normal[y * p : y * p + p, x * p : x * p + p]
        frames = [[patch[:, :, channel]] * numbers["temporal_patch_size"] for channel in range(3)]
        rows.append(np.array(frames, np.float32).ravel())
    return np.stack(rows)


def patch_order(height: int, width: int, m: int) -> Iterator[tuple[int, int]]:
    for block_y in range(height // m):
        for block_x in range(width // m):
            for y in range(m):
                for x in range(m):
                    yield block_y * m + y, block_x * m + x


def frequencies(d: int, theta: float) -> Array:
    exponents = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
    powers = np.array([theta ** float(e) for e in exponents]).astype(np.float32)
    return np.float32(1) / powers


def patch_rows(grid: tuple[int, int, int], m: int, vision: dict[str, Any]) -> tuple[Array, Array]:
    f = frequencies(vision["head_dim"] // 2, vision["rope_theta"])
    angles = np.stack([np.concatenate([np.float32(y) * f, np.float32(x) * f]) for y, x in patch_order(*grid[1:], m)])
    return np.cos(angles), np.sin(angles)


def learned_places(grid: tuple[int, int, int], m: int, side: int) -> tuple[Array, Array]:
    """The four rows of the table that each patch lies between, and the share of each."""
    index, weight = [], []
    for patch in patch_order(*grid[1:], m):
        (top, down), (left, right) = (between(at, n, side) for at, n in zip(patch, grid[1:], strict=True))
        index.append(
            [row * side + column for row in (top, min(top + 1, side - 1)) for column in (left, min(left + 1, side - 1))]
        )
        weight.append([a * b for a in (1 - down, down) for b in (1 - right, right)])
    return np.array(index), np.array(weight, np.float32)


def between(at: int, n: int, side: int) -> tuple[int, np.float32]:
    """Of `n` patches along a side the table's row before one, and how far behind it the patch is."""
    a = np.float32(at * (side - 1)) / np.float32(max(1, n - 1))
    return int(a), np.float32(a - np.floor(a))


def in_windows(grid: tuple[int, int, int], m: int, v: int) -> Array:
    rows, columns = grid[1] // m, grid[2] // m
    places = []
    for top in range(0, rows, v):
        for left in range(0, columns, v):
            for y in range(top, top + v):
                places += [y * columns + x if y < rows and x < columns else -1 for x in range(left, left + v)]
    return np.array(places)


def spread(rows: Array, places: Array, together: int) -> Array:
    """Rows of tokens, so many of each, at the token's place."""
    out = np.zeros((*rows.shape[:-2], len(places) * together, rows.shape[-1]), np.float32)
    for p, token in enumerate(places):
        if token >= 0:
            here, there = slice(p * together, (p + 1) * together), slice(token * together, (token + 1) * together)
            out[..., here, :] = rows[..., there, :]
    return out
