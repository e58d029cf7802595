"""Sizes of pictures, read from their headers: whether a file is there and is a picture, without decoding it.

A picture whose EXIF data turns it is refused: its annotators may have seen it either way up. Damage past the header is
found where the picture is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from PIL.ImageFile import ImageFile

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable
from gemvg_edge.images import MAX_ASPECT_RATIO
from gemvg_edge.pictures import open_picture, orientation
from train.data.record import Fault

Size = tuple[int, int]
# Where Pillow finds an orientation; to ask a PNG without any of them means to decode it.
_METADATA = frozenset(("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"))
_LATE = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # chunks of a PNG that hold them, before the pixels or after


@lru_cache(maxsize=1 << 18)  # composed records show one picture many times
def measure(path: Path) -> Size | Fault:
    """(width, height) of a picture file, or why it cannot be used."""
    try:
        if not is_file(path):
            return Fault(str(path), "a missing picture")
        with open_picture(path, printable(path)) as image:
            size = image.size
            turned = _has_metadata(image) and orientation(image) != 1
    except GemvgError:
        return Fault(str(path), "an unreadable picture")
    if max(size) > MAX_ASPECT_RATIO * min(size):
        return Fault(str(path), "a picture that is too thin for the model")
    return Fault(str(path), "a picture turned by its EXIF data") if turned else size


def _has_metadata(image: ImageFile) -> bool:
    if image.format == "TIFF" or _METADATA & image.info.keys():
        return True
    if image.format != "PNG" or (file := image.fp) is None:
        return False
    place = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8 and head[4:] not in _LATE:
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)  # past the chunk and its checksum
    file.seek(place)
    return head[4:] in _LATE


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
