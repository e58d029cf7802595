"""Sheets of pictures, pixel by pixel: every box stands where it should, on its own picture."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from gemvg_edge.boxes import Box
from gemvg_edge.draw import HEIGHT, draw_boxes, draw_sheet
from gemvg_edge.errors import GemvgError
from gemvg_edge.grounding import Grounding, Picture, Timings

GAP, TITLE = 8, 34
INK = (255, 0, 160)
GREY = (90, 90, 90)


def grey(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Plain pictures of (width, height)."""
    return [Image.new("RGB", size, GREY) for size in sizes]


def inked(sheet: Image.Image) -> npt.NDArray[np.bool_]:
    """Where the colour of boxes is, (height, width)."""
    found: npt.NDArray[np.bool_] = (np.asarray(sheet) == INK).all(axis=2)
    return found


def frame(sheet: Image.Image) -> tuple[int, int, int, int]:
    """The outermost coloured pixels: left, top, right, bottom."""
    rows, columns = np.nonzero(inked(sheet))
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def test_the_sheet_holds_the_pictures_at_equal_height() -> None:
    sheet = draw_sheet([*grey((200, 100)), Image.new("RGB", (384, 384), (0, 0, 200))], [], "the red mug")
    assert sheet.mode == "RGB"
    assert sheet.size == (GAP + 768 + GAP + 384 + GAP, TITLE + HEIGHT + GAP)
    pixels = np.asarray(sheet)
    assert (pixels[TITLE : TITLE + HEIGHT, GAP : GAP + 768] == GREY).all()
    assert (pixels[TITLE : TITLE + HEIGHT, GAP + 768 + GAP : -GAP] == (0, 0, 200)).all()
    assert (pixels[TITLE:, :GAP] == 255).all()
    assert (pixels[TITLE:, GAP + 768 : GAP + 768 + GAP] == 255).all()
    assert pixels[:TITLE].min() < 100, "the caption is there"
    assert not inked(sheet).any()


BOXES = [
    # label, size of the picture, box in its pixels, box on the sheet
    ("as large as the sheet", (384, 384), (100, 50, 200, 300), (100, 50, 200, 300)),
    ("grown twice", (192, 192), (10, 20, 30, 40), (20, 40, 60, 80)),
    ("shrunk ten times", (5000, 3840), (1000, 2000, 3000, 3500), (100, 200, 300, 350)),
    ("upright", (96, 192), (10, 20, 30, 40), (20, 40, 60, 80)),
    ("a tiny picture", (4, 4), (1, 1, 3, 2), (96, 96, 288, 192)),
    ("the whole picture", (384, 384), (0, 0, 384, 384), (0, 0, 384, 384)),
    ("parts of pixels", (192, 192), (10.25, 20.5, 30.25, 40.5), (20.5, 41, 60.5, 81)),
]


@pytest.mark.parametrize(("label", "size", "box", "drawn"), BOXES, ids=[case[0] for case in BOXES])
def test_a_box_stands_in_its_place(
    label: str, size: tuple[int, int], box: tuple[float, ...], drawn: tuple[float, ...]
) -> None:
    sheet = draw_sheet(grey(size), [Box(0, *box)], "")
    expected = [GAP + drawn[0], TITLE + drawn[1], GAP + drawn[2], TITLE + drawn[3]]
    assert np.abs(np.subtract(frame(sheet), expected)).max() <= 1, label
    # An outline three pixels wide on all four sides, and the picture untouched inside and around it.
    x1, y1, x2, y2 = frame(sheet)
    middle_x, middle_y = (x1 + x2) // 2, (y1 + y2) // 2
    ink = inked(sheet)
    assert ink[y1 : y2 + 1, middle_x].sum() == ink[middle_y, x1 : x2 + 1].sum() == 6
    assert sheet.getpixel((middle_x, middle_y)) == GREY
    if x1 > GAP + 2:
        assert sheet.getpixel((x1 - 3, middle_y)) == GREY


def test_boxes_go_to_their_own_pictures() -> None:
    boxes = [Box(1, 10, 10, 50, 50), Box(0, 100, 100, 150, 150), Box(1, 200, 200, 250, 250)]
    ink = inked(draw_sheet(grey((384, 384), (384, 384), (384, 384)), boxes, ""))
    thirds = [ink[:, start : start + 384 + GAP] for start in (GAP, 2 * GAP + 384, 3 * GAP + 768)]
    assert [part.any() for part in thirds] == [True, True, False]
    assert thirds[1][TITLE + 10 : TITLE + 51, 10:51].any()
    assert thirds[1][TITLE + 200 : TITLE + 251, 200:251].any()
    assert not thirds[0][:, :99].any()


def test_white_keeps_a_box_visible_on_its_own_colour() -> None:
    pixels = np.asarray(draw_sheet([Image.new("RGB", (384, 384), INK)], [Box(0, 100, 100, 200, 200)], ""))
    row = pixels[TITLE + 150, GAP + 95 : GAP + 110]
    assert (row == 255).all(axis=1).sum() == 2, "one white pixel on each side of the coloured line"


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 4000)])
def test_pictures_of_odd_shapes(size: tuple[int, int]) -> None:
    sheet = draw_sheet(grey(size), [Box(0, 0, 0, *map(float, size))], "a caption longer than the picture is wide")
    assert sheet.width == max(1, round(size[0] * HEIGHT / size[1])) + 2 * GAP
    assert inked(sheet).any()


def test_the_pictures_given_stay_as_they_were() -> None:
    pictures = grey((384, 384))
    draw_sheet(pictures, [Box(0, 1, 1, 300, 300)], "été 赤い杯\nsecond line")
    assert pictures[0].getcolors() == [(384 * 384, GREY)]


NO_BOXES = (
    Box(0, math.nan, 0, 1, 1), Box(0, 9, 0, 1, 1), Box(0, 0, 0, math.inf, 1), Box(1, 0, 0, 1, 1), Box(-1, 0, 0, 1, 1)
)  # fmt: skip


@pytest.mark.parametrize("box", NO_BOXES)
def test_what_is_no_box_is_not_drawn(box: Box) -> None:
    with pytest.raises(GemvgError, match="is no box in 1 pictures"):
        draw_sheet([Image.new("RGB", (9, 9))], [box], "")


def answer(query: str, *boxes: Box) -> Grounding:
    return Grounding(boxes, "", "", None, Timings(), query, ())


def test_boxes_are_drawn_at_the_pictures_own_size() -> None:
    pictures = grey((300, 200), (1000, 800))
    drawn = draw_boxes(pictures, answer("the mug", Box(1, 400, 300, 700, 600), Box(0, 20, 60, 90, 120)))
    assert [picture.size for picture in drawn] == [(300, 200), (1000, 800)]
    assert all(picture.getpixel((5, 5)) == GREY for picture in pictures), "the pictures given are left alone"
    for picture, (x1, y1, x2, y2) in zip(drawn, [(20, 60, 90, 120), (400, 300, 700, 600)], strict=True):
        ink = inked(picture)
        rows, columns = np.nonzero(ink)
        assert (columns.min(), rows.max(), columns.max()) >= (x1, y2, x2)
        assert ink[y2, x1 : x2 + 1].all()
        assert ink[y1 + 20 : y2, x1].all()
        assert picture.getpixel(((x1 + x2) // 2, (y1 + y2) // 2)) == GREY
        assert ink[: y1 - 2].any(), "the label stands above the box"


def test_each_answer_has_its_colour_and_frames_stay_apart() -> None:
    place = Box(0, 100, 100, 200, 200)
    drawn = draw_boxes(grey((300, 300)), [answer("a", place), answer("b", place)])[0]
    colours = [drawn.getpixel((x, 150)) for x in range(90, 110)]
    assert INK in colours
    assert (0, 150, 255) in colours


def test_labels_do_not_hide_each_other() -> None:
    """Twenty boxes in one place: each label has its own pixels, so there is as much ink as labels."""
    places = [Box(0, 100, 150, 200, 250, label=f"thing {k}") for k in range(20)]
    one, all_of_them = (
        inked(draw_boxes(grey((400, 600)), answer("q", *boxes))[0]).sum() for boxes in (places[:1], places)
    )
    frame_ink = inked(draw_boxes(grey((400, 600)), answer("", Box(0, 100, 150, 200, 250, label=" ")))[0]).sum()
    assert all_of_them > 15 * (one - frame_ink)


def test_a_turned_photograph_is_drawn_upright(tmp_path: Path) -> None:
    photograph = Image.new("RGB", (300, 200), GREY)
    exif = photograph.getexif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "turned.png", exif=exif)
    drawn = draw_boxes([tmp_path / "turned.png"], answer("q", Box(0, 50, 150, 150, 280)))[0]
    assert drawn.size == (200, 300)


def test_odd_labels_and_sizes_are_drawn() -> None:
    long = Box(0, 0, 0, 3, 4, label="é" * 500 + "\nsecond line")
    assert draw_boxes(grey((5, 5), (9000, 90)), answer("q", long, Box(1, 8990, 80, 9000, 90, label="赤い杯")))[
        0
    ].size == (
        5,
        5,
    )
    assert draw_boxes(grey((9, 9)), [])[0].size == (9, 9)


@pytest.mark.parametrize(
    "box", [Box(1, 1, 1, 2, 2), Box(-1, 1, 1, 2, 2), Box(0, 3, 3, 3, 9), Box(0, math.nan, 1, 2, 2)]
)
def test_refuses_to_draw_what_is_no_box(box: Box) -> None:
    with pytest.raises(GemvgError, match="is no box in 1 pictures"):
        draw_boxes(grey((20, 20)), answer("q", box))


def test_boxes_far_outside_are_drawn_at_once() -> None:
    started = time.process_time()
    draw_boxes(grey((300, 300)), answer("q", Box(0, 10, 10, 2e9, 1e30), Box(0, -1e12, -5, 100, 100)))
    assert time.process_time() - started < 2


def test_arrays_are_drawn_in_their_own_order_of_colours() -> None:
    blue = np.zeros((40, 50, 3), np.uint8)
    blue[:, :, 0] = 255
    assert draw_boxes([blue], [], bgr=True)[0].getpixel((0, 0)) == (0, 0, 255)


def test_other_pictures_than_were_asked_about_are_refused() -> None:
    asked = Grounding((), "", "", None, Timings(), "q", (Picture("a", 30, 40),))
    draw_boxes(grey((30, 40)), asked)
    for others in (grey((40, 30)), grey((30, 40), (30, 40))):
        with pytest.raises(GemvgError, match=r"the answer is about \[\(30, 40\)\]; give the same pictures"):
            draw_boxes(others, asked)
