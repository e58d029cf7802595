"""Preprocessing against transformers' Qwen2VLImageProcessorPil, pixel for pixel, and pictures of every make."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid, Preprocessing, load_image, patchify, resize, smart_resize
from tests.picture_bytes import encoded

Pixels = npt.NDArray[np.uint8]

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
# As they stand in preprocessor_config.json: Qwen2-VL as released, as transformers 5 saves it, MIG-Bench's budget, ...
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2-VL": {**CLIP, "min_pixels": 3136, "max_pixels": 12845056},
    "saved by transformers": {**CLIP, "size": {"shortest_edge": 3136, "longest_edge": 1003520}, "resample": 3},
    "MIG-Bench": {**CLIP, "min_pixels": 3136, "max_pixels": 401408},
    "small model": {**CLIP, "patch_size": 8, "min_pixels": 64 * 64, "max_pixels": 128 * 128},
    "fixed budget": {**CLIP, "min_pixels": 112 * 112, "max_pixels": 112 * 112},
    "no merging, bilinear": {
        **CLIP, "merge_size": 1, "patch_size": 16, "temporal_patch_size": 1, "min_pixels": 1024, "max_pixels": 65536,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.125], "resample": 2,
    },
}  # fmt: skip


@st.composite
def extents(draw: st.DrawFn) -> tuple[int, int]:
    """(height, width): ordinary, as thin as 200 to 1, or large."""
    kind = draw(st.sampled_from(["ordinary", "ordinary", "thin", "large"]))
    if kind == "thin":
        short = draw(st.integers(1, 12))
        sides = (short, draw(st.integers(short, 200 * short)))
    else:
        side = st.integers(1, 400) if kind == "ordinary" else st.integers(1000, 2500)
        sides = (draw(side), draw(side))
        if max(sides) > 200 * min(sides):
            sides = (200, max(sides))
    return sides if draw(st.booleans()) else (sides[1], sides[0])


def picture(height: int, width: int, seed: int) -> Pixels:
    """Noise over a slope, so that a shift and a wrong filter both show."""
    rng = np.random.default_rng(seed)
    slope = np.add.outer(np.linspace(0, 100, height), np.linspace(0, 100, width))[..., None]
    return (slope + rng.uniform(0, 55, (height, width, 3))).astype(np.uint8)


def reference(image: Image.Image, config: dict[str, Any], **steps: bool) -> tuple[npt.NDArray[np.float32], Grid]:
    """Patches and grid by transformers."""
    output = Qwen2VLImageProcessorPil(**config)(images=[image], return_tensors="np", **steps)
    t, h, w = output["image_grid_thw"][0].tolist()
    return output["pixel_values"], (t, h, w)


def unpatchify(patches: npt.NDArray[np.float32], grid: Grid, config: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Patches of the first frame -> (height, width, 3)."""
    merge, patch = config["merge_size"], config["patch_size"]
    _, h, w = grid
    blocks = patches.reshape(h // merge, w // merge, merge, merge, 3, config["temporal_patch_size"], patch, patch)
    return blocks[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * patch, w * patch, 3)


def check_against_reference(image: Image.Image, config: dict[str, Any]) -> None:
    preprocessing = Preprocessing.from_config(config)
    pixels = resize(load_image(image), preprocessing)
    raw, grid = reference(image, config, do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(pixels, unpatchify(raw, grid, config))
    patches, our_grid = patchify(pixels, preprocessing)
    expected, _ = reference(image, config)
    assert our_grid == grid
    assert patches.dtype == np.float32
    np.testing.assert_allclose(patches, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=25)
@given(extents(), st.integers(0, 2**32 - 1))
def test_equals_transformers(name: str, extent: tuple[int, int], seed: int) -> None:
    check_against_reference(Image.fromarray(picture(*extent, seed)), CONFIGS[name])


@pytest.mark.parametrize("extent", [(1, 1), (1, 200), (200, 1), (3, 3), (27, 29), (28, 28), (1, 3), (3, 1)])
@pytest.mark.parametrize("name", ["Qwen2-VL", "small model"])
def test_tiny_pictures_equal_transformers(name: str, extent: tuple[int, int]) -> None:
    check_against_reference(Image.fromarray(picture(*extent, 0)), CONFIGS[name])


def palette_picture(transparency: bytes | int | None) -> Image.Image:
    image = Image.fromarray(picture(40, 60, 1)).quantize(16)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def translucent(mode: str) -> Image.Image:
    rgba = np.dstack([picture(40, 60, 2), picture(40, 60, 3)[..., 0]])
    return Image.fromarray(rgba).convert(mode)


MODES = [
    ("bilevel", Image.fromarray(picture(40, 60, 0)).convert("1")),
    ("greyscale", Image.fromarray(picture(40, 60, 0)).convert("L")),
    ("greyscale with alpha", translucent("LA")),
    ("alpha", translucent("RGBA")),
    ("palette", palette_picture(None)),
    ("palette, one colour clear", palette_picture(3)),
    ("palette with alpha", palette_picture(bytes(range(0, 256, 16)))),
    ("CMYK", Image.fromarray(picture(40, 60, 0)).convert("CMYK")),
    ("YCbCr", Image.fromarray(picture(40, 60, 0)).convert("YCbCr")),
    ("32-bit integers", Image.fromarray(picture(40, 60, 0)[..., 0].astype(np.int32))),
    ("floats", Image.fromarray(picture(40, 60, 0)[..., 0].astype(np.float32))),
]


@pytest.mark.parametrize("image", [mode[1] for mode in MODES], ids=[mode[0] for mode in MODES])
def test_other_modes_equal_transformers(image: Image.Image) -> None:
    assert load_image(image).mode == "RGB"
    check_against_reference(image, CONFIGS["small model"])


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_greyscale_keeps_its_range(file_format: str) -> None:
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)  # black to white in 256 even steps
    image = np.asarray(load_image(encoded(Image.fromarray(levels), file_format)))
    np.testing.assert_array_equal(image, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


# How a camera stores an upright picture under each EXIF orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation: int) -> None:
    upright = picture(30, 50, 0)
    turn = STORED[orientation]
    stored = Image.fromarray(upright) if turn is None else Image.fromarray(upright).transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(load_image(encoded(stored, exif=exif))), upright)


def test_all_kinds_of_source_give_the_same_picture(tmp_path: Path) -> None:
    pixels = picture(30, 50, 0)
    content = encoded(Image.fromarray(pixels))
    path = tmp_path / "a picture.png"
    path.write_bytes(content)
    turned = np.asarray(pixels.transpose(1, 0, 2).copy()).transpose(1, 0, 2)  # the same values, not contiguous
    for source in (path, str(path), content, Image.open(path), Image.fromarray(pixels), pixels, turned):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_picture_given_stays_as_it_was() -> None:
    image = translucent("RGBA")
    before = np.asarray(image).copy()
    load_image(image)
    np.testing.assert_array_equal(np.asarray(image), before)
    assert image.mode == "RGBA"


PNG = encoded(Image.fromarray(picture(64, 64, 0)))
JPEG = encoded(Image.fromarray(picture(64, 64, 0)), "JPEG")
WEBP = encoded(Image.fromarray(picture(64, 64, 0)), "WEBP")

BAD_SOURCES: list[tuple[str, Any, str]] = [
    ("no bytes", b"", "not a picture"),
    ("text", b"these are not pixels", "not a picture"),
    ("PNG cut in its data", PNG[: len(PNG) // 2], "damaged or cut short"),
    ("PNG cut in its header", PNG[:40], "(40 bytes)"),  # which of the two sentences is up to Pillow
    ("PNG cut after its header", PNG[:45], "damaged or cut short"),
    ("JPEG cut in its data", JPEG[: len(JPEG) // 2], "damaged or cut short"),
    ("JPEG cut in its tables", JPEG[:40], "damaged or cut short"),
    ("WebP cut short", WEBP[: len(WEBP) // 2], "damaged or cut short"),
    ("floats", np.zeros((8, 8, 3), np.float32), "float32"),
    ("16-bit array", np.zeros((8, 8, 3), np.uint16), "uint16"),
    ("booleans", np.zeros((8, 8, 3), bool), "bool"),
    ("channels first", np.zeros((3, 8, 8), np.uint8), "(3, 8, 8)"),
    ("two channels", np.zeros((8, 8, 2), np.uint8), "(8, 8, 2)"),
    ("a batch", np.zeros((2, 8, 8, 3), np.uint8), "(2, 8, 8, 3)"),
    ("an array without pixels", np.zeros((0, 8, 3), np.uint8), "(0, 8, 3)"),
    ("None", None, "NoneType"),
    ("a list", [[0, 0, 0]], "list"),
    ("a number", 3, "int"),
]


@pytest.mark.parametrize(("source", "message"), [bad[1:] for bad in BAD_SOURCES], ids=[bad[0] for bad in BAD_SOURCES])
def test_refuses(source: Any, message: str) -> None:
    with pytest.raises(GemvgError, match=re.escape(message)) as error:
        load_image(source, "picture 2")
    assert "picture 2" in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_files_by_their_name(tmp_path: Path) -> None:
    text, cut = tmp_path / "notes.png", tmp_path / "cut.png"
    text.write_text("these are not pixels")
    cut.write_bytes(PNG[: len(PNG) // 2])
    for path, message in (
        (tmp_path / "missing.png", "no such picture file"),
        (tmp_path, "no such picture file"),
        (text, "not a picture"),
        (cut, "damaged or cut short"),
    ):
        with pytest.raises(GemvgError, match=f"{re.escape(str(path))}.*{message}"):
            load_image(path)


def test_refuses_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(GemvgError, match="more pixels"):
        load_image(PNG)


# A damaged size may be just below the limit, where Pillow only warns.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@given(st.binary(max_size=200), st.sampled_from([PNG, JPEG, WEBP]), st.integers(0, 100))
@settings(max_examples=200)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on broken metadata
def test_damage_gives_a_picture_or_one_sentence(damage: bytes, content: bytes, at: int) -> None:
    try:
        image = load_image(content[:at] + damage + content[at + len(damage) :])
    except GemvgError:
        return
    assert image.mode == "RGB"


@pytest.mark.parametrize("extent", [(1, 201), (201, 1), (10, 2001)])
def test_refuses_what_transformers_refuses(extent: tuple[int, int]) -> None:
    image = Image.fromarray(picture(*extent, 0))
    with pytest.raises(ValueError, match="aspect ratio"):
        reference(image, CONFIGS["Qwen2-VL"])
    with pytest.raises(GemvgError, match="longer than 200 to 1"):
        smart_resize(*extent, Preprocessing.from_config(CONFIGS["Qwen2-VL"]))


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_refuses_a_config_without_a_step(step: str) -> None:
    with pytest.raises(GemvgError, match=step):
        Preprocessing.from_config({**CONFIGS["Qwen2-VL"], step: False})


BUDGETS: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("Qwen2-VL's own spelling", {"min_pixels": 1, "max_pixels": 2}, (1, 2)),
    ("transformers 5", {"size": {"shortest_edge": 1, "longest_edge": 2}}, (1, 2)),
    ("transformers 4.50", {"size": {"min_pixels": 1, "max_pixels": 2}}, (1, 2)),
    ("both", {"min_pixels": 1, "max_pixels": 2, "size": {"shortest_edge": 3, "longest_edge": 4}}, (1, 2)),
    ("null beside a size", {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 1, "longest_edge": 2}},
     (1, 2)),
    ("none", {}, (3136, 1003520)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "budget"), [case[1:] for case in BUDGETS], ids=[case[0] for case in BUDGETS])
def test_reads_both_spellings_of_the_budget(config: dict[str, Any], budget: tuple[int, int]) -> None:
    preprocessing = Preprocessing.from_config(config)
    assert (preprocessing.min_pixels, preprocessing.max_pixels) == budget


def test_survives_its_config() -> None:
    preprocessing = Preprocessing.from_config(CONFIGS["no merging, bilinear"])
    assert Preprocessing.from_config(preprocessing.to_config()) == preprocessing
