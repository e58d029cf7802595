"""Lines for cpp_service about the shipped pictures, and whether its answers are Python's.

python examples/cpp_service/lines.py write 10000 lines      PPMs of the pictures are written beside the file
python examples/cpp_service/lines.py check lines answers
"""

from __future__ import annotations

import json
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image

from gemvg_edge import Grounder

IMAGES = Path(__file__).resolve().parents[1] / "images"


def write(count: int, file: Path) -> None:
    """So many lines, a scene after the other."""
    lines = []
    for scene in json.loads((IMAGES / "scenes.json").read_text()):
        pictures = [file.absolute().with_name(f"{name}.ppm") for name in scene["images"]]
        for name, picture in zip(scene["images"], pictures, strict=True):
            Image.open(IMAGES / name).convert("RGB").save(picture)
        lines.append("\t".join([scene["query"], *map(str, pictures)]))
    file.write_text("".join(f"{line}\n" for line in islice(cycle(lines), count)))


def check(lines: list[str], answers: list[str]) -> None:
    """Exit code 1 at the first answer that is not Python's."""
    grounder = Grounder.open()
    known: dict[str, Any] = {}
    for line, answer in zip(lines, map(json.loads, answers), strict=True):
        query, *pictures = line.split("\t")
        if line not in known:
            known[line] = grounder.look(pictures).ground(query)
        boxes = [[box[key] for key in ("image", "x1", "y1", "x2", "y2", "score")] for box in answer.get("boxes", [])]
        if boxes != [[box.image, *box.corners, box.score] for box in known[line]] or "error" in answer:
            sys.exit(f"another answer than Python's to {line!r}: {answer}")
    print(f"{len(answers)} answers, all as Python's, to {len(known)} different lines")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", count, file]:
            write(int(count), Path(file))
        case ["check", lines, answers]:
            check(Path(lines).read_text().splitlines(), Path(answers).read_text().splitlines())
        case _:
            sys.exit(__doc__)
