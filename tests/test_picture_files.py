"""Picture files of strangers: the right picture or one sentence, in `load_image` and in the data converters alike."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from gemvg_edge.draw import draw_sheet
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Preprocessing, load_image, resize
from tests.picture_bytes import encoded, has_avif, png, tiff
from tests.test_data_coco import good
from tests.test_data_single import shape, write_labelme
from train.data.pictures import measure
from train.data.record import Fault
from train.data.voc_labelme import read_labelme

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP = LEVELS.astype(np.uint16) * 257  # the same scene at 16 bits
TWELVE = (LEVELS.astype(np.uint16) << 4) | (LEVELS >> 4)  # and at 12
COLOUR = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def pgm(levels: npt.NDArray[Any], white: int) -> bytes:
    return b"P5 %d %d %d\n" % (*levels.T.shape, white) + levels.astype(">u2").tobytes()


def deep_image(mode: str, dtype: str) -> Image.Image:
    return Image.frombytes(mode, DEEP.shape[::-1], DEEP.astype(dtype).tobytes())


GREY: dict[str, bytes | Image.Image] = {
    "PNG": png(DEEP, 16),
    "PNG without a key's value": png(DEEP, 16, extra=[(b"tRNS", b"\x01\x02")]),
    "PGM of 12 bits": pgm(TWELVE, 4095),
    "PGM of 16 bits": pgm(DEEP, 65535),
    "PGM in words": b"P2 16 16 65535 " + b" ".join(b"%d" % value for value in DEEP.flat),
    "TIFF of 12 bits": tiff(TWELVE, 12),
    "TIFF": tiff(DEEP.astype("<u2")),
    "TIFF, big-endian": tiff(DEEP.astype(">u2")),
    "TIFF, white is 0": tiff(65535 - DEEP.astype("<u2"), photometric=0),
    "TIFF, compressed": encoded(Image.fromarray(DEEP), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF of 8 bits, white is 0": tiff(255 - LEVELS, photometric=0),
    "TIFF of 32 bits, levels": tiff(LEVELS.astype("<i4")),
    "TIFF of floats, levels": tiff(LEVELS.astype(">f4")),
    "JPEG 2000": encoded(Image.fromarray(DEEP), "JPEG2000"),
    "image I;16": Image.fromarray(DEEP),
    "image I;16B": deep_image("I;16B", ">u2"),
    "image I;16L": deep_image("I;16L", "<u2"),
    "image I, levels": Image.fromarray(LEVELS.astype(np.int32)),
    "image F, levels": Image.fromarray(LEVELS.astype(np.float32)),
    "image I of a PGM": Image.open(io.BytesIO(pgm(DEEP, 65535))),
}


@pytest.mark.parametrize("label", GREY)
def test_the_same_scene_at_any_depth_is_the_same_picture(label: str) -> None:
    pixels = np.asarray(load_image(GREY[label]))
    np.testing.assert_array_equal(pixels, np.repeat(LEVELS[..., None], 3, axis=2))


def test_the_key_of_a_deep_png_is_white() -> None:
    pixels = np.asarray(load_image(png(DEEP, 16, extra=[(b"tRNS", struct.pack(">H", DEEP[3, 4]))])))
    expected = LEVELS.copy()
    expected[3, 4] = 255
    np.testing.assert_array_equal(pixels[..., 0], expected)


def with_value(value: float, dtype: str) -> npt.NDArray[Any]:
    levels = LEVELS.astype(dtype)
    levels[5, 6] = value
    return levels


NO_WHITE: dict[str, bytes | Image.Image] = {
    "32 bits": tiff(DEEP.astype("<i4")),
    "32 bits, unsigned": tiff(with_value(2**32 - 1, "<u4")),
    "below black": tiff(with_value(-1, "<i2")),
    "16 bits with a sign": tiff(DEEP.astype("<i4").clip(0, 32767).astype("<i2")),
    "8 bits with a sign": tiff(LEVELS.astype("i1")),
    "floats of 0 to 1": tiff((LEVELS / 255).astype("<f4")),
    "floats past 255": tiff(DEEP.astype(">f4")),
    "NaN": tiff(with_value(np.nan, "<f4")),
    "infinity": tiff(with_value(np.inf, "<f4")),
    "image I": Image.fromarray(DEEP.astype(np.int32)),
    "image F of 0 to 1": Image.fromarray((LEVELS / 255).astype(np.float32)),
    "image F of 0 to 1.5": Image.fromarray((LEVELS / 170).astype(np.float32)),
    "image F of light": Image.fromarray((LEVELS / 20).astype(np.float32)),
    "image I of labels": Image.fromarray((LEVELS > 100).astype(np.int32)),
    "16 bits that hold 12": Image.fromarray(LEVELS.astype(np.uint16) * 16),
    "image F of NaN": Image.fromarray(np.full((8, 8), np.nan, np.float32)),
}


@pytest.mark.parametrize("label", NO_WHITE)
def test_grey_that_does_not_say_what_is_white_is_refused(label: str) -> None:
    with pytest.raises(GemvgError, match=r"^picture 2.* has grey levels .*8 bits") as caught:
        load_image(NO_WHITE[label], "picture 2")
    assert "\n" not in str(caught.value)


ALPHA = np.stack([LEVELS, LEVELS.T], axis=2)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa"])
def test_white_shows_through(mode: str) -> None:
    image = Image.fromarray(ALPHA, "LA") if mode[0] == "L" else Image.fromarray(ALPHA, "LA").convert("RGBA")
    pixels = np.asarray(load_image(image.convert(mode)))
    alpha = ALPHA[..., 1:] / 255
    expected = np.repeat(ALPHA[..., :1] * alpha + 255 * (1 - alpha), 3, axis=2)
    np.testing.assert_allclose(pixels, expected, atol=2)  # premultiplied colours are rounded twice


def exif(turn: int, *broken: bytes) -> bytes:
    """An EXIF block of an orientation and tags that are broken: 12 bytes each, of higher tags."""
    entries = [struct.pack(">HHIHH", ORIENTATION, 3, 1, turn, 0), *broken]
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)


# Of the kinds that Pillow fails to write again: a text as a number, a value past the end, a fraction by nothing.
BROKEN = [
    struct.pack(">HHI4s", 0x011A, 2, 4, b"abc\0"),
    struct.pack(">HHII", 0x8769, 4, 2**31, 2**31),
    struct.pack(">HHII", 0x8825, 5, 1, 0),
    struct.pack(">HHI4s", 0xA005, 7, 4, b"\xff" * 4),
]
STORED = Image.fromarray(COLOUR).transpose(Image.Transpose.ROTATE_90)  # what orientation 6 turns back
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TURNED: dict[str, bytes] = {
    "EXIF": encoded(STORED, exif=exif(6)),
    "EXIF with broken tags": encoded(STORED, exif=exif(6, *BROKEN)),
    "EXIF after the pixels": png(np.asarray(STORED), 8, 2, late=[(b"eXIf", exif(6)[6:])]),
    "XMP": png(np.asarray(STORED), 8, 2, extra=[(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)]),
    "XMP after the pixels": png(np.asarray(STORED), 8, 2, late=[(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)]),
    "EXIF as text": png(
        np.asarray(STORED), 8, 2, extra=[(b"tEXt", b"Raw profile type exif\0\nexif\n 9\n" + exif(6).hex().encode())]
    ),
    "TIFF": encoded(STORED, "TIFF", tiffinfo={ORIENTATION: 6}),
    "TIFF, compressed": encoded(STORED, "TIFF", tiffinfo={ORIENTATION: 6}, compression="tiff_lzw"),
    "WebP": encoded(STORED, "WEBP", lossless=True, exif=exif(6, *BROKEN)),
}


@pytest.mark.parametrize("label", TURNED)
def test_every_turn_is_seen_by_both_readers(label: str, tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    path.write_bytes(TURNED[label])
    picture = load_image(path)
    np.testing.assert_array_equal(np.asarray(picture), COLOUR)
    np.testing.assert_array_equal(np.asarray(load_image(picture)), COLOUR)  # and not turned once more
    assert measure(path) == Fault(str(path), "a picture turned by its EXIF data")


UPRIGHT: dict[str, bytes] = {
    "no block": encoded(Image.fromarray(COLOUR), exif=b"Exif\0\0MM"),
    "no number": encoded(Image.fromarray(COLOUR), exif=exif(0, *BROKEN)),
    "no such turn": encoded(Image.fromarray(COLOUR), exif=exif(9, *BROKEN)),
    "text": png(COLOUR, 8, 2, extra=[(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nnot hexadecimal")]),
    "a TIFF's group": tiff(LEVELS, tags=[(34665, 4, 1, 2), (34853, 2, 2**31, 2)]),
    "a JPEG": encoded(Image.fromarray(COLOUR), "JPEG", exif=exif(1, *BROKEN)),
}


@pytest.mark.parametrize("label", UPRIGHT)
def test_broken_metadata_leaves_the_picture(label: str, tmp_path: Path) -> None:
    path = tmp_path / "upright.png"
    path.write_bytes(UPRIGHT[label])
    assert load_image(path).size == measure(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the caller's own opening
        opened = Image.open(path)
    assert load_image(opened).size == measure(path)


def bomb(width: int, height: int) -> bytes:
    return png(LEVELS)[:16] + struct.pack(">II", width, height) + png(LEVELS)[24:]


SCAN = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
BAD: dict[str, bytes] = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "XPM": b'/* XPM */\nstatic char * a[] = {\n"1 1 1 1",\n". c #000000",\n"."};\n',
    "DDS": b"DDS |\0\0\0" + b"\x0f\x10" * 60,
    "BLP": b"BLP2" + b"\x01\x00\x05\x05" * 40,
    "EMF": struct.pack("<II", 1, 88) + bytes(32) + b" EMF" + bytes(100),
    "SPIDER": struct.pack(">27f", 1, 24, 1, 1, 1, *[0] * 7, 24, 1, *[0] * 8, 96, *[0] * 4) + bytes(4000),
    "TIFF at a float": tiff(LEVELS).replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 273, 11)),
    "TIFF of many bytes": tiff(LEVELS, tags=[(270, 2, 2**32 - 1, 8)])[:-80],
    "a billion pixels": bomb(100_000, 10_000),
    "a row of 100 million": bomb(10**8, 1),
    "no pixels": bomb(0, 16),
    "a PNG's text bomb": png(LEVELS, extra=[(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**23)))]),
    "many scans": SCAN[:-2] + SCAN[SCAN.rfind(b"\xff\xda") : -2] * 200 + SCAN[-2:],
    "PGM cut short": pgm(DEEP, 65535)[:-40],
    "PFM": b"Pf 2 2 nan\n" + bytes(16),
    "AVIF cut short": encoded(Image.fromarray(COLOUR), "AVIF")[:-40] if has_avif() else b"ftypavif",
}  # fmt: skip


@pytest.mark.parametrize("label", BAD)
def test_whatever_pillow_raises_is_one_sentence(label: str, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(BAD[label])
    for source, name in ((path, f"{path}"), (BAD[label], "images[1] ("), (io_image(BAD[label]), "images[1] ")):
        if source is not None:
            with pytest.raises(GemvgError) as caught:
                load_image(source, "images[1]")
            assert str(caught.value).startswith(name)
            assert "\n" not in str(caught.value)
    assert isinstance(measure(path), (Fault, tuple))


@pytest.mark.parametrize("label", ["EPS", "a billion pixels", "AVIF cut short", "TIFF at a float", "SPIDER"])
def test_one_bad_picture_does_not_end_a_conversion(label: str, tmp_path: Path) -> None:
    folder = write_labelme(tmp_path, shape("mug", [[1, 2], [30, 40]]))
    (folder / "labels" / "b.json").write_text((folder / "labels" / "a.json").read_text().replace("a.png", "b.png"))
    (folder / "pictures" / "b.png").write_bytes(BAD[label])
    records, tally = good(read_labelme(folder))
    assert [record.images[0].name for record in records] == ["a.png"]
    assert sum(tally.refused.values()) == 1
    assert set(tally.refused) <= {"an unreadable picture", "a picture of another size than its annotation says"}


def io_image(content: bytes) -> Image.Image | None:
    """An image that Pillow opened and that fails later, or None."""
    try:
        return Image.open(io.BytesIO(content), formats=["PNG", "TIFF", "JPEG", "PPM"])
    except Exception:  # that is what the test is about
        return None


def test_no_program_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gs, ran = tmp_path / "gs", tmp_path / "ran"
    gs.write_text(f"#!/bin/sh\ntouch {ran}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = tmp_path / "photograph.png"
    path.write_bytes(BAD["EPS"])
    with pytest.raises(GemvgError, match="not a picture"):
        load_image(path)
    assert not ran.exists()


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


NAMES: dict[str, tuple[Callable[[Path], str | Path], str]] = {
    "long": (lambda folder: folder / ("a" * 300), "File name too long"),
    "a null character": (lambda folder: f"{folder}/a\0b.png", "cannot be read"),
    "a surrogate": (lambda folder: f"{folder}/\ud800.png", "cannot be read"),
    "not Unicode": (lambda folder: folder / os.fsdecode(b"\xff.png"), "no such picture file"),
    "two lines": (lambda folder: folder / "a\nb.png", "no such picture file"),
    "a folder": (lambda folder: folder, "no such picture file"),
    "a pipe": (pipe, "no such picture file"),
    "a device": (lambda folder: "/dev/zero", "no such picture file"),
    "nothing": (lambda folder: "", "no such picture file"),
}


@pytest.mark.parametrize("label", NAMES)
def test_a_name_that_leads_to_no_picture(label: str, tmp_path: Path) -> None:
    place, message = NAMES[label]
    path = place(tmp_path)
    with pytest.raises(GemvgError, match=message) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()
    assert isinstance(measure(Path(path)), Fault)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    path.write_bytes(png(LEVELS))
    path.chmod(0)
    with pytest.raises(GemvgError, match="Permission denied"):
        load_image(path)
    assert measure(path) == Fault(str(path), "an unreadable picture")


def closed_unread() -> Image.Image:
    image = Image.open(io.BytesIO(png(LEVELS)))
    image.close()
    return image


def closed_read() -> Image.Image:
    image = Image.fromarray(LEVELS)
    image.close()
    return image


def file_closed() -> Image.Image:
    with io.BytesIO(png(LEVELS)) as file:
        return Image.open(file)


IMAGES: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "closed": (closed_unread, "closed"),
    "closed after it was read": (closed_read, "closed"),
    "its file closed": (file_closed, "closed"),
    "cut short": (lambda: Image.open(io.BytesIO(encoded(Image.fromarray(COLOUR), "JPEG")[:-200])), "cut short"),
    "no pixels": (lambda: Image.new("RGB", (0, 0)), "0 x 0"),
    "no height": (lambda: Image.new("L", (5, 0)), "5 x 0"),
    "an empty object": (lambda: Image.Image(), "0 x 0"),
}


@pytest.mark.parametrize("label", IMAGES)
def test_an_image_that_cannot_be_read(label: str) -> None:
    make, message = IMAGES[label]
    with pytest.raises(GemvgError, match=message) as caught:
        load_image(make(), "images[1]")
    assert str(caught.value).startswith("images[1] is ")
    assert "\n" not in str(caught.value)


def test_warnings_are_neither_told_nor_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(png(LEVELS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # of 256: a warning of Pillow's, an error only of 400
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert load_image(path).size == measure(path) == (16, 16)
    assert not told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path.read_bytes()).size == (16, 16)


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [load_image(GREY["PNG"]) for _ in range(30)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_a_thin_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    path.write_bytes(png(np.zeros((1, 300), np.uint8)))
    pixels = np.zeros((1, 300, 3), np.uint8)
    for source, name in ((path, str(path)), (load_image(path), str(path)), (pixels, "images[1]")):
        with pytest.raises(GemvgError) as caught:
            resize(load_image(source, "images[1]"), Preprocessing())
        assert str(caught.value) == f"{name}: a picture of 300 x 1 pixels is longer than 200 to 1; crop it first"
    with pytest.raises(GemvgError, match=f"^{path}: .*longer than 200 to 1"):
        draw_sheet([load_image(path)], [], "")  # 300 times as wide as high, at any height
    assert measure(path) == Fault(str(path), "a picture that is too thin for the model")


NUMBERS: list[tuple[str, Any]] = [
    *[("patch_size", value) for value in (0, -14, 1024, 10**300, 14.5, float("inf"), True, "14", [14])],
    *[("merge_size", value) for value in (0, 17, False)],
    *[("temporal_patch_size", value) for value in (0, 17, "2")],
    *[("min_pixels", value) for value in (0, -1, 2**25, 10**300, 3136.5, float("nan"), True, "3136")],
    *[("max_pixels", value) for value in (0, 2**32, float("inf"), False, [1])],
    *[("size", value) for value in (7, [1], {"height": 9, "width": 9}, {"shortest_edge": 0}, {"longest_edge": "a"})],
    *[("image_mean", value) for value in (0.5, [0.5], [0.5] * 4, [0.5, 0.5, float("nan")], [0.5, 0.5, "0.5"], "abc")],
    *[("image_std", value) for value in ([0, 1, 1], [1, 1, float("inf")], [1e-300] * 3, [True] * 3, [10**400] * 3)],
    *[("rescale_factor", value) for value in (0, -1, float("nan"), float("inf"), 1e-300, True, "1/255", [1])],
    *[("resample", value) for value in (-1, 6, 2.5, True, "bicubic")],
    ("do_resize", False),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), NUMBERS)
def test_refuses_numbers_of_no_sense(field: str, value: Any) -> None:
    with pytest.raises(GemvgError, match=field if field != "size" else "size|_pixels") as caught:
        Preprocessing.from_config({field: value})
    assert len(str(caught.value)) < 300


def test_refuses_a_budget_that_no_picture_meets() -> None:
    with pytest.raises(GemvgError, match="min_pixels, 4096, is above max_pixels, 1024"):
        Preprocessing.from_config({"min_pixels": 4096, "max_pixels": 1024})


def test_whole_numbers_may_be_written_as_floats() -> None:
    numbers = Preprocessing.from_config({"max_pixels": 401408.0, "rescale_factor": 1, "image_std": [1, 1, 1]})
    assert (numbers.max_pixels, numbers.rescale_factor, numbers.image_std) == (401408, 1.0, (1.0, 1.0, 1.0))
    assert type(numbers.max_pixels) is int
