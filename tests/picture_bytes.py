"""Picture files that Pillow does not write: grey of any depth, tags and chunks of one's own."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Chunk = tuple[bytes, bytes]  # kind and content
Tag = tuple[int, int, int, int]  # tag, type, count, value or offset


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file, by Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def has_avif() -> bool:
    """Whether this Pillow writes AVIF."""
    Image.init()
    return "AVIF" in Image.SAVE


def png(
    levels: npt.NDArray[Any], bits: int = 8, colour: int = 0, extra: Sequence[Chunk] = (), late: Sequence[Chunk] = ()
) -> bytes:
    """A PNG of unsigned values (H, W) or (H, W, C) of 8 or 16 bits; chunks before its pixels, and after them."""
    height, width = levels.shape[:2]
    rows = levels.astype(">u2" if bits == 16 else "u1")
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", packed), *late, (b"IEND", b"")]
    parts = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(levels: npt.NDArray[Any], bits: int = 0, photometric: int = 1, tags: Sequence[Tag] = ()) -> bytes:
    """A grey TIFF of values (H, W) in the array's own kind and byte order; 12 bits are packed."""
    height, width = levels.shape
    kind = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    data = _packed_12(levels) if bits == 12 else levels.tobytes()
    order = ">" if levels.dtype.str[0] == ">" else "<"
    stored = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 4, 1, bits or levels.dtype.itemsize * 8), (259, 4, 1, 1),
        (262, 4, 1, photometric), (273, 4, 1, 8), (277, 4, 1, 1), (278, 4, 1, height), (279, 4, 1, len(data)),
        (339, 4, 1, kind), *tags,
    ]  # fmt: skip
    entries = b"".join(struct.pack(f"{order}HHII", *tag) for tag in sorted(stored))
    start = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(stored)) + entries + bytes(4)


def _packed_12(levels: npt.NDArray[Any]) -> bytes:
    pairs = levels.reshape(len(levels), -1, 2).astype(np.uint16)  # of even width
    first, second = pairs[..., 0], pairs[..., 1]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()
