"""Boxes on pictures: each picture at its own size, or all on one sheet under a caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.grounding import Grounding
from gemvg_edge.images import ImageSource, check_aspect, check_list, load_image
from gemvg_edge.pictures import NAME

HEIGHT = 384  # of every picture on the sheet, in pixels
GAP = 8  # pixels between two pictures
_INK, _PAPER = (255, 0, 160), (255, 255, 255)
# A colour a query; told apart on most pictures and by most eyes (Okabe and Ito's, brightened, after our own).
COLOURS = (
    _INK,
    (0, 150, 255),
    (255, 140, 0),
    (0, 190, 120),
    (240, 228, 66),
    (150, 90, 255),
    (213, 60, 0),
    (0, 220, 220),
)
Rectangle = tuple[float, float, float, float]
LABEL = 40  # characters of a label on a picture
FINEST, SHARE = 12, 40  # a letter's least height in pixels, and how many of it a picture's shorter side has otherwise


def draw_boxes(
    images: Sequence[ImageSource], groundings: Grounding | Sequence[Grounding], *, bgr: bool = False
) -> list[Image.Image]:
    """Copies of the pictures, given as to `look`, with the boxes of one or several answers about them.

    Each answer has its colour; each box its number, counted over all answers, and its label. GemvgError for a box that
    lies in none of the pictures, and for pictures of other sizes than those that were asked about.
    """
    answers = [groundings] if isinstance(groundings, Grounding) else list(groundings)
    images = check_list(images)
    drawn = [load_image(source, f"images[{k}]", bgr) for k, source in enumerate(images)]  # upright, as boxes count
    for grounding in answers:
        asked = [(picture.width, picture.height) for picture in grounding.pictures]
        if asked and asked != (sizes := [image.size for image in drawn]):
            raise GemvgError(f"the pictures have sizes {sizes}, the answer is about {asked}; give the same pictures")
    pens = [ImageDraw.Draw(image) for image in drawn]
    numbered = [(k, box, grounding.query) for k, grounding in enumerate(answers) for box in grounding.boxes]
    for k, box, _ in numbered:
        _check(box, len(images))
        width = _stroke(drawn[box.image])
        out = (k % len(COLOURS)) * (width + 1)  # frames of several answers around one thing stay apart
        corners = [box.x1 - out, box.y1 - out, box.x2 + out, box.y2 + out]
        _outline(pens[box.image], corners, COLOURS[k % len(COLOURS)], width)
    taken: list[list[Rectangle]] = [[] for _ in drawn]
    for number, (k, box, query) in enumerate(numbered, 1):
        label = (box.label or query).splitlines() or [""]
        text = _cut(f"{number} {label[0]}".strip())
        _write(pens[box.image], drawn[box.image], box, COLOURS[k % len(COLOURS)], text, taken[box.image])
    return drawn


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures at their own size on one sheet, left to right."""
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), _PAPER)
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + GAP
    return sheet


def draw_sheet(images: Sequence[Image.Image], boxes: Sequence[Box], caption: str) -> Image.Image:
    """One sheet: the pictures (RGB, any size) at equal height, left to right, with their boxes, under the caption.

    GemvgError for a picture that is too wide for the model, since at this height it would fill the memory.
    """
    for image in (image for image in images if image.width > image.height):
        check_aspect(image.width, image.height, image.info.get(NAME, ""))
    for box in boxes:
        _check(box, len(images))
    title = 34
    scales = [HEIGHT / image.height for image in images]
    widths = [max(1, round(image.width * scale)) for image, scale in zip(images, scales, strict=True)]
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(images) + 1), HEIGHT + title + GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 6), caption, fill=(0, 0, 0), font=ImageFont.load_default(20))
    left = GAP
    for index, (image, scale, width) in enumerate(zip(images, scales, widths, strict=True)):
        sheet.paste(image.resize((width, HEIGHT), Image.Resampling.LANCZOS), (left, title))
        for box in (box for box in boxes if box.image == index):
            corners = [left + box.x1 * scale, title + box.y1 * scale, left + box.x2 * scale, title + box.y2 * scale]
            _outline(pen, corners, _INK, 3)
        left += width + GAP
    return sheet


def _check(box: Box, pictures: int) -> None:
    if not (0 <= box.image < pictures and all(map(math.isfinite, box)) and box.area > 0):
        raise GemvgError(f"{box} is no box in {pictures} pictures; give x1 < x2 and y1 < y2 of one of them")


def _outline(pen: ImageDraw.ImageDraw, corners: Sequence[float], colour: tuple[int, int, int], width: int) -> None:
    # Pillow draws what lies outside too, for as long as it is large.
    most = 2 * max(pen.im.size)
    corners = [min(max(value, -most), most) for value in corners]
    # White under the colour keeps a box visible on any picture.
    pen.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=_PAPER, width=width + 2)
    pen.rectangle(corners, outline=colour, width=width)


def _write(
    pen: ImageDraw.ImageDraw,
    image: Image.Image,
    box: Box,
    colour: tuple[int, int, int],
    text: str,
    taken: list[Rectangle],
) -> None:
    """A box's label above it: above others that stand there, or below them where the picture ends."""
    height = _letter(image)
    font = ImageFont.load_default(height)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, tall = right - left + height // 2, bottom - top + height // 2
    x = max(0.0, min(box.x1, image.width - width))
    y = max(0.0, box.y1 - tall)
    while here := _meeting((x, y, x + width, y + tall), taken):
        y = min(old[1] for old in here) - tall
        if y < 0:
            y = max(old[3] for old in taken if old[0] < x + width and x < old[2])
            break
    taken.append((x, y, x + width, y + tall))
    pen.rectangle(taken[-1], fill=colour)
    dark = sum(colour) < 3 * 150
    pen.text((x + height // 4 - left, y + height // 4 - top), text, fill=_PAPER if dark else (0, 0, 0), font=font)


def _meeting(one: Rectangle, others: Sequence[Rectangle]) -> list[Rectangle]:
    x1, y1, x2, y2 = one
    return [old for old in others if old[0] < x2 and x1 < old[2] and old[1] < y2 and y1 < old[3]]


def _letter(image: Image.Image) -> int:
    return max(FINEST, min(image.size) // SHARE)


def _stroke(image: Image.Image) -> int:
    return max(2, _letter(image) // 6)


def _cut(text: str) -> str:
    return text if len(text) <= LABEL else f"{text[: LABEL - 3]}..."
