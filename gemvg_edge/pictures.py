"""Picture files of strangers -> upright RGB: a right picture or one sentence, whatever Pillow raises.

The one place that knows how Pillow fails, which formats are read, and what is white in a grey picture of more than 8
bits. Knows nothing about the model.
"""

from __future__ import annotations

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image, TiffImagePlugin, TiffTags, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable, reason, unreadable

# What cameras, scanners and data sets write, each with a magic number. Of Pillow's other readers EPS runs a program,
# several take any text for a picture, and those of games and faxes fail in ways of their own.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
NAME = "gemvg_edge_name"  # in a loaded picture's `info`: what it is called in sentences
FAINT, FAINT_OF_16 = 16, 2**12  # a grey picture whose brightest pixel is below a 16th of white is in other units
MAX_SIDE = 2**18  # pixels; Pillow copies its buffer for every 64 KiB of a row, which takes minutes for a longer one
MAX_SCANS = 100  # of a JPEG; encoders write about 10, and 12 bytes ask for one more pass over all pixels
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_MIN_IS_WHITE, _SIGNED = 0, 2  # and their values
_MARKER, _SOS, _EOI = (
    re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]"),
    0xDA,
    0xD9,
)  # in JPEG's data 0xff is not followed by these

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or its remarks on odd files land on stderr


class _Quiet:
    """No warning of Pillow's on broken metadata or large pictures, neither told nor, where they are errors, raised.

    Threads inside at the same time share one change of Python's filters: each with its own, the last to leave would put
    back what another had set.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._filters = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(kind, error, at)


_quiet = _Quiet()


@contextmanager
def pillow_errors(name: str, complaint: str = "is damaged or cut short") -> Iterator[None]:
    """Turns whatever Pillow raises inside into one GemvgError about the picture `name`, and keeps it from warning."""
    try:
        with _quiet:
            yield
    except GemvgError:
        raise
    except UnidentifiedImageError:
        raise GemvgError(f"{name} is not a picture that Pillow can read; give a PNG, JPEG, WebP or similar") from None
    except Image.DecompressionBombError:
        raise GemvgError(f"{name} has more pixels than Pillow's safety limit; scale it down first") from None
    except MemoryError:
        raise GemvgError(f"{name} takes more memory than there is; scale it down first") from None
    except Exception as error:  # damage raises nearly every kind in Pillow's readers
        raise GemvgError(f"{name} {complaint}: {printable(reason(error))[:200]}") from None


@contextmanager
def open_picture(source: Path | bytes, name: str) -> Iterator[ImageFile]:
    """A picture's file or its bytes, its header read and its pixels not; any error inside is one about the picture."""
    try:
        file = source.open("rb") if isinstance(source, Path) else io.BytesIO(source)
    except (OSError, ValueError) as error:
        raise unreadable(Path(name), error) from None
    # Pillow gets the open file, not its name: by name it would map the file, and die if that is cut while it is read.
    with file, pillow_errors(name), Image.open(file, formats=_formats()) as opened:
        _check_size(opened, name)
        yield opened


def picture_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height that a picture's header tells, before any of its pixels takes memory."""
    with open_picture(data, name) as opened:
        return opened.size


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(known for known in FORMATS if known in Image.OPEN)  # AVIF is missing before Pillow 11.3


def _drop_broken_groups(image: TiffImagePlugin.TiffImageFile) -> None:
    # Pillow reads these groups of EXIF once the pixels are there; damage in one would lose the picture.
    exif = image.getexif()
    for group in [group for group in TiffTags.TAGS_V2_GROUPS if group in exif]:
        try:
            exif.get_ifd(group)
        except Exception:  # damaged metadata raises as many kinds as damaged pixels
            del exif[group]


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, a key of TURNS, or 1: upright, or nothing that can be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
        return int(found) if found in TURNS else 1
    except Exception:  # damaged metadata of a picture that may be whole
        return 1


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture as upright RGB of 8 bits on white, a new one; to be called where Pillow's errors are caught."""
    _check_size(image, name)
    if image.format in ("JPEG", "MPO") and isinstance(image, ImageFile) and image.tile:
        _check_scans(image, name)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tile:
        _drop_broken_groups(image)
    image.load()
    turn = TURNS.get(orientation(image))
    rgb = _rgb(image, name)
    return rgb.transpose(turn) if turn is not None else rgb


def _check_size(image: Image.Image, name: str) -> None:
    if not (0 < image.width <= MAX_SIDE and 0 < image.height <= MAX_SIDE):
        size = f"{image.width} x {image.height} pixels"
        raise GemvgError(f"{name} is a picture of {size}; give one of 1 to {MAX_SIDE} pixels on each side")


def _check_scans(image: ImageFile, name: str) -> None:
    if (file := image.fp) is None:
        return
    place = file.tell()
    file.seek(0)
    data, at, scans = file.read(), 2, 0
    file.seek(place)
    while (marker := _MARKER.search(data, at)) and (kind := data[marker.end() - 1]) != _EOI:
        scans += kind == _SOS
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    if scans > MAX_SCANS:
        raise GemvgError(f"{name} is a JPEG of {scans} scans, which would take long to decode; save it again")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image, name).convert("RGB")
    if image.mode == "L" and _tag(image, _SAMPLE_FORMAT) == _SIGNED:
        raise GemvgError(f"{name} has grey levels with a sign, of which none is black; convert it to unsigned 8 bits")
    if image.has_transparency_data:
        # White shows through, as in transformers and Qwen's own tools; dropping alpha would show colours nobody sees.
        # Pillow drops the alpha of premultiplied grey unless it is asked for it first.
        visible = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible)
    return image.convert("RGB")


def _grey(image: Image.Image, name: str) -> Image.Image:
    """Grey of more than 8 bits -> the upper 8 of them; Pillow's own conversion clips at 255, which is white or black.

    Integers of 32 bits and floats do not say which value is white. As in Pillow they are taken for levels of 0 to 255
    if they can be, and refused otherwise: past 255, or so near to 0 that they are shares, labels or light. The same of
    16 bits that hold 12 or fewer.
    """
    values, bits = np.asarray(image), _bits(image)
    low, high = values.min(), values.max()  # either is NaN where any value is
    if bits == 16 and 0 < high < FAINT_OF_16:
        raise GemvgError(
            f"{name} has grey levels of 16 bits, none above {high}, where white is 65535: it would be read as black; "
            "scale them to 16 bits, or save 8 bits"
        )
    if bits is None:
        if not (low >= 0 and high <= 255) or 0 < high < FAINT:
            raise GemvgError(
                f"{name} has grey levels of 32 bits, from {low:g} to {high:g}, and does not say which is white; "
                "scale them so that white is 255 and save 8 bits, or 65535 and save 16 bits"
            )
        bits = 8
    levels = (values.astype(np.uint16) >> (bits - 8)).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC) == _MIN_IS_WHITE:
        levels = 255 - levels
    key = image.info.get("transparency")
    if isinstance(key, int):  # of a PNG: the value that is clear, so white shows through
        levels = np.where(values == key, np.uint8(255), levels)
    return Image.fromarray(levels)


def _bits(image: Image.Image) -> int | None:
    """How many bits the grey levels of an image have that says so."""
    if image.mode.startswith("I;16"):
        bits = _tag(image, _BITS)
        return bits if isinstance(bits, int) and 8 < bits < 16 else 16  # scanners pack 12 bits in TIFF
    # Pillow scales PGM to 16 bits, whatever its own white is; so does PNG have 16 there, before Pillow 11.3.
    return 16 if image.mode == "I" and image.format in ("PPM", "PNG") else None


def _tag(image: Image.Image, tag: int) -> object:
    """A value of a TIFF; None of other pictures."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    value = image.tag_v2.get(tag)
    return value[0] if isinstance(value, tuple) and value else value
