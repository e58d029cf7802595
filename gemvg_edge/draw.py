"""Boxes on pictures, side by side with a caption: what the demo, the command line and the README show."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import NAME, check_aspect

HEIGHT = 384  # of every picture on the sheet, in pixels
_INK, _PAPER = (255, 0, 160), (255, 255, 255)


def draw_boxes(images: Sequence[Image.Image], boxes: Sequence[Box], caption: str) -> Image.Image:
    """One sheet: the pictures (RGB, any size) at equal height, left to right, with their boxes, under the caption.

    GemvgError for a picture that is too wide for the model, since at this height it would fill the memory.
    """
    for image in (image for image in images if image.width > image.height):
        check_aspect(image.width, image.height, image.info.get(NAME, ""))
    for box in boxes:
        finite = all(map(math.isfinite, (box.x1, box.y1, box.x2, box.y2)))
        if not (0 <= box.image < len(images) and finite and box.area > 0):
            raise GemvgError(f"{box} is no box in {len(images)} pictures; give x1 < x2 and y1 < y2 of one of them")
    gap, title = 8, 34
    scales = [HEIGHT / image.height for image in images]
    widths = [max(1, round(image.width * scale)) for image, scale in zip(images, scales, strict=True)]
    sheet = Image.new("RGB", (sum(widths) + gap * (len(images) + 1), HEIGHT + title + gap), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 6), caption, fill=(0, 0, 0), font=ImageFont.load_default(20))
    left = gap
    for index, (image, scale, width) in enumerate(zip(images, scales, widths, strict=True)):
        sheet.paste(image.resize((width, HEIGHT), Image.Resampling.LANCZOS), (left, title))
        for box in (box for box in boxes if box.image == index):
            corners = [left + box.x1 * scale, title + box.y1 * scale, left + box.x2 * scale, title + box.y2 * scale]
            # White under the colour keeps a box visible on any picture.
            pen.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=_PAPER, width=5)
            pen.rectangle(corners, outline=_INK, width=3)
        left += width + gap
    return sheet
