"""Arrays of pixels: what OpenCV, PIL, cameras and torch hand over is read rightly, or refused with what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from gemvg_edge import GemvgError, Grounder
from gemvg_edge.images import load_image

RED, RGB = (200, 10, 30), np.full((6, 9, 3), (200, 10, 30), np.uint8)
ALPHA = np.dstack([RGB, np.full((6, 9), 255, np.uint8)])
GREY = np.arange(54, dtype=np.uint8).reshape(6, 9)

# label, array, bgr, what comes out of each pixel
READ: dict[str, tuple[npt.NDArray[Any], bool, npt.NDArray[np.uint8]]] = {
    "RGB": (RGB, False, RGB),
    "BGR": (RGB[:, :, ::-1], True, RGB),
    "RGBA": (ALPHA, False, RGB),
    "BGRA": (ALPHA[:, :, [2, 1, 0, 3]], True, RGB),
    "RGBA, half clear": (np.dstack([RGB, np.full((6, 9), 0, np.uint8)]), False, np.full_like(RGB, 255)),
    "grey": (GREY, False, np.dstack([GREY] * 3)),
    "grey of three axes": (GREY[:, :, None], True, np.dstack([GREY] * 3)),
    "grey of 16 bits": (GREY.astype(np.uint16) * 257, False, np.dstack([GREY] * 3)),
    "grey of 16 bits, the other order of bytes": (
        (GREY.astype(np.uint16) * 257).astype(">u2"),
        False,
        np.dstack([GREY] * 3),
    ),
    "grey of 16 bits, three axes": (GREY.astype(np.uint16)[:, :, None] * 257, False, np.dstack([GREY] * 3)),
    "a part of a larger array": (np.tile(RGB, (2, 2, 1))[3:9, 4:13], False, RGB),
    "read backwards": (RGB[::-1, ::-1], False, RGB),
    "columns first in memory": (np.asfortranarray(RGB), False, RGB),
}


@pytest.mark.parametrize("label", READ)
def test_arrays_are_read(label: str) -> None:
    array, bgr, expected = READ[label]
    before = array.copy()
    picture = load_image(array, bgr=bgr)
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), expected)
    assert np.array_equal(array, before)


REFUSED: dict[str, tuple[Any, str]] = {
    "floats": (RGB / 255, r"give \(array \* 255\).round\(\).astype\(np.uint8\) if white is 1.0"),
    "half floats": (RGB.astype(np.float16), "array of float16, which does not say which value is white"),
    "booleans": (GREY > 9, r"give array.astype\(np.uint8\) \* 255"),
    "colours of 16 bits": (RGB.astype(np.uint16), r"give \(array >> 8\).astype\(np.uint8\)"),
    "faint grey of 16 bits": (GREY.astype(np.uint16), "none above 53, where white is 65535"),
    "channels first": (np.moveaxis(RGB, -1, 0), r"give np.moveaxis\(array, 0, -1\), if its channels come first"),
    "whole numbers with a sign": (RGB.astype(np.int32), "array of int32"),
    "a batch": (RGB[None], r"shape \(1, 6, 9, 3\)"),
    "a tensor of torchvision": (
        torch.zeros(3, 6, 9),
        r"give \(tensor.permute\(1, 2, 0\) \* 255\).round\(\).byte\(\).cpu",
    ),
    "a tensor of bytes": (torch.zeros(3, 6, 9, dtype=torch.uint8), r"give tensor.permute\(1, 2, 0\).byte\(\).cpu\(\)"),
    "a tensor like an array": (torch.zeros(6, 9, 3, dtype=torch.int64), r"give tensor.byte\(\).cpu\(\).numpy\(\)"),
    "a batch of tensors": (torch.zeros(1, 3, 6, 9), r"a batch; give one picture of it, tensor\[0\]"),
}


@pytest.mark.parametrize("label", REFUSED)
def test_others_are_refused_with_the_fix(label: str) -> None:
    source, message = REFUSED[label]
    with pytest.raises(GemvgError, match=r"images\[3\].*" + message):
        load_image(source, "images[3]")


def test_the_fix_for_a_tensor_works() -> None:
    picture = torch.from_numpy(RGB).permute(2, 0, 1).float() / 255
    mended = (picture.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    assert np.array_equal(np.asarray(load_image(mended)), RGB)


def test_bgr_and_rgb_bring_the_same_boxes() -> None:
    grounder = Grounder.open(threads=1)
    images = Path(__file__).parents[1] / "examples" / "images"
    pixels = [np.asarray(Image.open(images / f"scene1-{k}.png").convert("RGB")) for k in "ab"]
    expected = grounder.ground(pixels, "all balls")
    swapped = [np.ascontiguousarray(picture[:, :, ::-1]) for picture in pixels]
    assert grounder.ground(swapped, "all balls", bgr=True).boxes == expected.boxes != ()
    assert grounder.look(swapped, bgr=True).ground("all balls").text == expected.text


def test_bgr_says_nothing_of_files() -> None:
    picture = Image.new("RGB", (4, 4), RED)
    assert load_image(picture, bgr=True).getpixel((0, 0)) == RED
