"""Records drawn for people to look at: every picture of a record with its boxes, and the words under it."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gemvg_edge.draw import draw_sheet
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable, replacing, unwritable, write_text
from train.data.record import Record
from train.data.sizes import open_pictures

LINE, SIZE = 26, 18  # of the words on a PNG sheet, in pixels
COLUMNS = 110  # characters a line there
STYLE = "body{font:16px sans-serif;margin:2em}img{max-width:100%}figure{margin:0 0 2em}figcaption{white-space:pre-wrap}"


def write_sheet(records: Sequence[Record], file: Path) -> None:
    """A .png, or a .html that holds its pictures itself."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise unwritable(file.parent, error) from None
    match file.suffix.lower():
        case ".png":
            drawn = _stack([_draw(record) for record in records])
            with replacing(file) as partial:
                drawn.save(partial, "PNG")
        case ".html":
            figures = "\n".join(_figure(record) for record in records)
            page = (
                f'<!doctype html>\n<meta charset="utf-8">\n<title>Records</title>\n<style>{STYLE}</style>\n{figures}\n'
            )
            write_text(file, page.encode("utf-8", "backslashreplace").decode())  # names of files may be no Unicode
        case other:
            raise GemvgError(f"{printable(file)}: a sheet is a .html or a .png, not {other!r}")


def words_of(record: Record) -> str:
    """What stands under a record's pictures."""
    boxes = f"boxes: {len(record.boxes)}" if record.kind != "understanding" else f"answer: {record.words}"
    thinking = f"\nthinking: {record.thinking}" if record.thinking else ""
    return f"{record.query}\n{record.kind}, {record.mode}, {record.source}, {boxes}{thinking}"


def _pictures(record: Record) -> Image.Image | str:
    """The record's pictures side by side, or why they cannot be shown."""
    try:
        images = open_pictures(record)
    except GemvgError as error:
        return str(error)
    return draw_sheet(images, record.boxes, "" if len(images) == 1 else f"images 1 to {len(images)}, left to right")


def _figure(record: Record) -> str:
    shown = _pictures(record)
    if isinstance(shown, str):
        body = f"<p>{html.escape(shown)}</p>"
    else:
        encoded = io.BytesIO()
        shown.save(encoded, "JPEG", quality=85)
        body = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}">'
    return f"<figure>{body}<figcaption>{html.escape(words_of(record))}</figcaption></figure>"


def _draw(record: Record) -> Image.Image:
    shown = _pictures(record)
    text = words_of(record) if isinstance(shown, Image.Image) else f"{words_of(record)}\n{shown}"
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, COLUMNS) or [""]]
    picture = shown if isinstance(shown, Image.Image) else Image.new("RGB", (1, 1), "white")
    font = ImageFont.load_default(SIZE)
    width = max([picture.width, *(round(font.getlength(line)) + 16 for line in lines)])
    panel = Image.new("RGB", (width, picture.height + LINE * len(lines) + 2 * LINE), "white")
    panel.paste(picture, (0, 0))
    pen = ImageDraw.Draw(panel)
    for row, line in enumerate(lines):
        pen.text((8, picture.height + 4 + row * LINE), line, fill=(0, 0, 0), font=font)
    return panel


def _stack(panels: Sequence[Image.Image]) -> Image.Image:
    """The panels one under another."""
    size = max((panel.width for panel in panels), default=1), max(1, sum(panel.height for panel in panels))
    sheet, top = Image.new("RGB", size, "white"), 0
    for panel in panels:
        sheet.paste(panel, (0, top))
        top += panel.height
    return sheet
