"""Damaged pictures: `load_image` and the converters' `measure` give a picture or one sentence, and agree on sizes."""

from __future__ import annotations

import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from gemvg_edge.errors import GemvgError
from gemvg_edge.images import load_image
from tests.picture_bytes import encoded, has_avif, png, tiff
from train.data.pictures import measure
from train.data.record import Fault

SIZE = 24, 20  # (width, height)
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
}


def seeds() -> list[bytes]:
    """One small picture of every format and mode, of every compression, with metadata, and of more than one frame."""
    return list(_seeds())


def check(data: bytes) -> None:
    """Feed one input to both readers; AssertionError or any error but GemvgError is a find."""
    image, sentence = None, ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = load_image(data, "picture")
        except GemvgError as error:
            sentence = str(error)
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            file.write(data)
            file.flush()
            size = measure(Path(file.name))
            measure.cache_clear()
    if image is None:
        assert sentence.startswith(f"picture ({len(data)} bytes) ")
        assert sentence.isprintable()
        assert len(sentence) < 500
    else:
        assert image.mode == "RGB"
        assert 0 not in image.size
        # What the converters refuse although it can be read: turned pictures, thin ones.
        refused = isinstance(size, Fault) and ("turned" in size.reason or "thin" in size.reason)
        assert refused or size == image.size, (size, image.size)


def _seeds() -> Iterator[bytes]:
    width, height = SIZE
    ramp = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8) * 6
    colour = Image.fromarray(np.stack([ramp, ramp.T[:1, :1] + ramp // 2, 255 - ramp], axis=2))
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8825] = 6, "maker", {1: "N", 2: (1.0, 2.0, 3.0)}
    metadata: dict[str, Any] = {
        "exif": exif.tobytes(),
        "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    }
    images: Callable[[str], Image.Image] = lambda mode: deep if mode == "I;16" else colour.convert(mode)  # noqa: E731
    for file_format, modes in FORMATS.items():
        if file_format == "AVIF" and not has_avif():
            continue
        for mode in modes:
            if mode == "I;16B":
                yield tiff(ramp.astype(">u2") * 257)
                continue
            yield encoded(images(mode), file_format)
        if file_format in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
            yield encoded(colour, file_format, **metadata)
        if file_format in ("PNG", "GIF", "TIFF", "WEBP", "AVIF"):
            yield encoded(colour, file_format, save_all=True, append_images=[colour.rotate(90), colour.rotate(180)])
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield encoded(colour, "TIFF", compression=compression)
    yield encoded(colour.convert("1"), "TIFF", compression="group4")
    yield encoded(colour, "JPEG", progressive=True)
    yield encoded(colour, "MPO", save_all=True, append_images=[colour])
    yield encoded(colour.convert("P"), "GIF", transparency=3, interlace=1)
    for values, bits in ((ramp.astype("<u2") * 16, 12), (ramp.astype("<u2") * 257, 16)):
        yield tiff(values, bits, photometric=0)
    yield b"P5 %d %d 4095\n" % SIZE + (ramp.astype(">u2") * 16).tobytes()
    yield b"P2 # a comment\n2 2 1000 1 20 300\n1000"
    yield b"Pf 2 2 -1.0\n" + struct.pack("<4f", 0, 0.5, 1, float("nan"))
    yield png(ramp, 8, extra=[(b"tRNS", b"\0\x06"), (b"zTXt", b"Comment\0\0nothing")])
    yield png(ramp.astype(np.uint16) * 257, 16, extra=[(b"tRNS", b"\x06\x06")], late=[(b"eXIf", exif.tobytes()[6:])])
    yield png(ramp, 8, extra=[(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')])
    yield tiff(ramp, tags=[(0x0112, 4, 1, 8), (34665, 4, 1, 2)])
