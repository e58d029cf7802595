"""Sizes of pictures, read from their headers: whether a file is there and is a picture, without decoding it.

A picture whose EXIF data turns it is refused: its annotators may have seen it either way up. Damage past the header is
found where the picture is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from PIL import Image

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable
from gemvg_edge.images import load_image
from train.data.record import Fault, Record, check

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


def open_pictures(record: Record) -> list[Image.Image]:
    """A record's pictures, turned as their EXIF data says; GemvgError for one of another size than the record says."""
    images = [load_image(path) for path in record.images]
    for path, image, (width, height) in zip(record.images, images, record.sizes, strict=True):
        if image.size != (width, height):
            raise GemvgError(
                f"{printable(path)} has {image.width} x {image.height} pixels and its record says {width} x {height}, "
                "so that its boxes may be elsewhere; mend the record or leave it out"
            )
    return images


def picture_fault(record: Record) -> Fault | None:
    """Why a record's pictures cannot be used, by their headers: the stored sizes must be theirs."""
    measured = (measure_as(path, size) for path, size in zip(record.images, record.sizes, strict=True))
    return next((found for found in measured if isinstance(found, Fault)), None)


def keep_measured(items: Iterable[Record | Fault]) -> Iterator[Record | Fault]:
    """The same items, a record whose pictures cannot be used as the fault that they have."""
    for item in items:
        yield item if isinstance(item, Fault) or check(item) else picture_fault(item) or item
