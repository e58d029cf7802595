"""Records against their pictures: a stored size must be the picture's own, or boxes are learned in wrong places.

By a picture's header where many records are read, and once more where its pixels are. EXIF data that turns a picture is
a fault here as for every data set: whether `sizes` are of the turned picture, nobody can tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from PIL import Image

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable
from gemvg_edge.images import load_image
from train.data.pictures import measure_as
from train.data.record import Fault, Record, check


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
