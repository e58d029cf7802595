"""Ground the shipped scenes with the shipped model, print the boxes and draw them on one sheet.

    python examples/demo.py [demo.png]

Needs the runtime alone: `pip install '.[onnx]'`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from gemvg_edge import Grounder
from gemvg_edge.draw import draw_sheet
from gemvg_edge.files import replacing

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    """Ask every scene its question."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "demo.png")
    grounder = Grounder.open()
    sheets = []
    for scene in json.loads((IMAGES / "scenes.json").read_text(encoding="utf-8")):
        pictures = [Image.open(IMAGES / name) for name in scene["images"]]
        grounding = grounder.ground(pictures, scene["query"])
        print(f'"{scene["query"]}"')
        for box in grounding.boxes:
            print(f"  {scene['images'][box.image]}  x1={box.x1:.0f} y1={box.y1:.0f} x2={box.x2:.0f} y2={box.y2:.0f}")
        if not grounding.boxes:
            print("  nothing found")
        sheets.append(draw_sheet(pictures, grounding.boxes, caption(scene["query"])))
    with replacing(target) as partial:
        stack(sheets, columns=2).save(partial)
    print(f"drawn: {target}")


def caption(query: str) -> str:
    """The query without the tokens around a box that it shows."""
    return query.replace("<|box_start|>", "").replace("<|box_end|>", "")


def stack(sheets: list[Image.Image], columns: int) -> Image.Image:
    """Sheets on a white page, row by row."""
    rows = [sheets[start : start + columns] for start in range(0, len(sheets), columns)]
    heights = [max(sheet.height for sheet in row) for row in rows]
    page = Image.new("RGB", (max(sum(sheet.width for sheet in row) for row in rows), sum(heights)), "white")
    for k, row in enumerate(rows):
        for n, sheet in enumerate(row):
            page.paste(sheet, (sum(left.width for left in row[:n]), sum(heights[:k])))
    return page


if __name__ == "__main__":
    main()
