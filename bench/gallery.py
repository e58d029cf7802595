"""Answers as a page to look at: pictures with true and answered boxes, filtered by task, IoU and what went wrong.

    python -m bench.gallery runs/accuracy/mine.mig-bench.jsonl [--out gallery.html] [--limit 200]

One HTML file with everything in it, pictures made small; it asks nobody for anything. The filters stand in its address,
so that a link shows what was chosen: gallery.html#kind=wrong+image&part=region.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.boxes.answers import Answered, read_answers, write_box
from bench.boxes.kinds import KINDS, RIGHT, kinds_of, overlap_of
from gemvg_edge.command import command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable, read_bytes, read_text, refuse_inputs, refuse_present, write_text
from gemvg_edge.images import load_image
from train.data.annotations import inside
from train.journal import Line

PAGE = Path(__file__).with_name("boxes") / "gallery.html"
SIDE = 480  # pixels of a picture's longer side on the page
TEXT = 4000  # characters of an answer that are shown
BOXES = 100  # of an answer, and of the truth, that are drawn
BEGIN = b"<!doctype html>"


@command("bench.gallery")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.gallery", description="Answers as a page to look at.")
    parser.add_argument("answers", type=Path, help="a .jsonl of bench.accuracy")
    out = "the page to write (default: beside the answers, .html in place of .jsonl)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    many = "how many answers are shown, wrong ones first and the tasks in turn (default: %(default)s)"
    parser.add_argument("--limit", type=whole_number, metavar="N", default=200, help=many)
    data = "the folder that the pictures lie in (default: where they lay when they were asked about)"
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=data)
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there already")
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    if not is_file(args.answers):
        raise GemvgError(f"{printable(args.answers)}: no such file; give answers of bench.accuracy")
    page = args.out or args.answers.with_suffix(".html")
    refuse_inputs(page, [args.answers], "--out")
    if not args.overwrite:
        refuse_present(page, "--out")
    elif is_file(page) and not read_bytes(page).startswith(BEGIN):
        raise GemvgError(f"--out {printable(page)} exists and is no page; give another place")
    header, answers = read_answers(args.answers)
    shown, total = choose(answers, args.limit)
    if not shown:
        raise GemvgError(f"{printable(args.answers)} has no answer yet")
    root = args.data or Path(str(header.get("data", "")))
    print(f"pictures are taken from {printable(root)}", file=sys.stderr)  # which a stranger's file may have named
    content, missing = gather(header, shown, root, total)
    write_text(page, render(content))
    if missing:
        print(f"{missing} pictures are not at hand; --data says where they lie", file=sys.stderr)
    told = {"page": str(page), "answers": len(shown), "of": total, "missing": missing, "bytes": page.stat().st_size}
    print(json.dumps(told))


def choose(answers: Iterable[Answered], limit: int) -> tuple[list[tuple[Answered, list[str]]], int]:
    """(up to `limit` answers and what happened to each: wrong ones first, the parts in turn; how many there are)."""
    rated = [(answer, kinds_of(answer.boxes, answer.truth, answer.problem)) for answer in answers]
    rated.sort(key=lambda pair: (pair[1] == [RIGHT], pair[0].number))
    place: dict[tuple[str, bool], int] = {}
    keys = []
    for answer, kinds in rated:
        key = answer.part, kinds == [RIGHT]
        place[key] = place.get(key, -1) + 1
        keys.append((kinds == [RIGHT], place[key], answer.number))
    order = sorted(range(len(rated)), key=lambda k: keys[k])[:limit]
    return [rated[k] for k in order], len(rated)


def gather(
    header: Line, shown: Sequence[tuple[Answered, list[str]]], root: Path, total: int
) -> tuple[dict[str, Any], int]:
    """(what the page shows; how many pictures are missing)."""
    names = list(dict.fromkeys(name for answer, _ in shown for name in answer.images))
    pictures = {name: _small(root, name) for name in tqdm(names, desc="pictures", delay=2, leave=False)}
    numbers = {name: k for k, name in enumerate(names)}
    kept = [
        {
            "id": answer.id,
            "part": answer.part,
            "kinds": kinds,
            "iou": round(overlap_of(answer.boxes, answer.truth), 4),
            "query": answer.query[:TEXT],
            "answer": answer.answer[:TEXT],
            "problem": answer.problem,
            "sizes": answer.sizes,
            "pictures": [numbers[name] for name in answer.images],
            "truth": [write_box(box) for box in answer.truth[:BOXES]],
            "boxes": [write_box(box) for box in answer.boxes[:BOXES]],
        }
        for answer, kinds in shown
    ]
    content = {
        "title": f"{header.get('model')}: {header['task']}",
        "note": f"{len(shown)} of {total} answers" + ("" if len(shown) == total else ", wrong ones first"),
        "kinds": KINDS,
        "pictures": [pictures[name] for name in names],
        "answers": kept,
    }
    return content, sum(picture is None for picture in pictures.values())


def _small(root: Path, name: str) -> str | None:
    """A picture below the folder as a data URL; None where it is not there, or none."""
    try:
        path = inside(root, name)
        if not is_file(path):
            return None
        image = load_image(path)
    except (GemvgError, ValueError):
        return None
    image.thumbnail((SIDE, SIDE))
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(coded.getvalue()).decode()


def render(content: dict[str, Any]) -> str:
    """The page; what a model or a data set wrote cannot end the script that it stands in."""
    written = json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e")
    return read_text(PAGE).replace("/*DATA*/", written)


if __name__ == "__main__":
    main()
