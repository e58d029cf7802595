"""Files of answers and benchmark folders, made by hand for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bench.boxes.answers import FORMAT, VERSION

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"


def line(number: int, part: str, truth: Sequence[Any] = (), boxes: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
    """An answer about two pictures of 100 x 100; boxes are (image, x1, y1, x2, y2, label and score where given)."""
    content: dict[str, Any] = {
        "id": f"{part}/{number}", "number": number, "part": part, "images": ["a.png", "b.png"],
        "sizes": [[100, 100], [100, 100]], "query": f"thing {number}", "truth": [box(*b) for b in truth],
        "answer": "None", "boxes": [box(*b) for b in boxes], "thinking": "", "problem": None, "tokens": 4, "ms": 1.0,
        "extra": {},
    }  # fmt: skip
    return content | more


def box(image: int, *corners: Any) -> dict[str, Any]:
    """A box as a line has it."""
    said: dict[str, Any] = {"image": image, "box": list(corners[:4])}
    for key, value in zip(("label", "score"), corners[4:], strict=False):
        said[key] = value
    return said


def write_answers(file: Path, task: str, lines: Iterable[dict[str, Any]], **header: Any) -> Path:
    """A file as bench.accuracy leaves it."""
    head = {"format": FORMAT, "version": VERSION, "task": task, "benchmark": "", "questions": "q", "model": file.stem}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in ({**head, **header}, *lines)))
    return file


def paint(file: Path, size: tuple[int, int] = (64, 48)) -> Path:
    """A grey picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 90, 90)).save(file)
    return file
