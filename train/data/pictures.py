"""Sizes of pictures, read from their headers: whether a file is there and is a picture, without decoding it.

A picture whose EXIF data turns it is refused: its annotators may have seen it either way up. Damage past the header is
found where the picture is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from PIL import Image

from train.data.record import Fault

_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
Size = tuple[int, int]


@lru_cache(maxsize=1 << 18)  # composed records show one picture many times
def measure(path: Path) -> Size | Fault:
    """(width, height) of a picture file, or why it cannot be used."""
    if not path.is_file():
        return Fault(str(path), "a missing picture")
    try:
        with Image.open(path) as image:
            turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1
            size = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return Fault(str(path), "an unreadable picture")
    return Fault(str(path), "a picture turned by its EXIF data") if turned else size


def measure_all(paths: Iterable[Path]) -> tuple[Size, ...] | Fault:
    """The sizes of several pictures, or the first fault."""
    sizes: list[Size] = []
    for path in paths:
        size = measure(path)
        if isinstance(size, Fault):
            return size
        sizes.append(size)
    return tuple(sizes)


def measure_as(path: Path, annotated: Size) -> Size | Fault:
    """The size of a picture that must have the size its annotation says."""
    size = measure(path)
    if isinstance(size, Fault) or size == annotated:
        return size
    return Fault(str(path), "a picture of another size than its annotation says")
