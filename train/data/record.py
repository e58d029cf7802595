"""One grounding example, whatever data set it came from, and the JSON Lines file that keeps many of them.

    {"images": ["a.jpg", "b.jpg"], "sizes": [[640, 480], [500, 375]], "query": "the red mug",
     "boxes": [[1, 10.0, 20.0, 60.0, 90.0]], "kind": "referential", "source": "COCO"}

Image paths are relative to the file's folder. Boxes are (image, x1, y1, x2, y2): the 0-based image, then pixels of the
original. A query may show a box too; it is written as MIG-Bench writes it, in 0..1000 of the picture's own size
(`<|box_start|>(x1,y1),(x2,y2)<|box_end|>`), and turned into a checkpoint's own coordinates when it is asked.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import check_query

# Three of GeM-VG's kinds and the three parts of the second (paper section 3 as summarised by third parties), and the
# multi-image question answering that its first stage mixes in.
Kind = Literal["referential", "semantic", "spatial", "temporal", "reasoning", "understanding"]
Mode = Literal["direct", "cot"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MODES: tuple[Mode, ...] = get_args(Mode)
PIXEL_SLACK = 1.0  # a box may end this far outside its picture: data sets round


@dataclass(frozen=True)
class Record:
    """Pictures, a query and the boxes (pixels of the originals) or, for `understanding`, the words that answer it."""

    images: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each picture
    query: str
    boxes: tuple[Box, ...]
    kind: Kind
    source: str
    mode: Mode = "direct"
    thinking: str = ""  # the reasoning that a `cot` answer starts with
    words: str = ""  # the answer of an `understanding` record


@dataclass(frozen=True)
class Fault:
    """A record that a reader refused: where it stands in its data set, and why."""

    where: str
    reason: str


@dataclass
class Tally:
    """What a reading gave: how many records were kept, and the refused ones by reason with an example of each."""

    kept: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """A summary to print."""
        total = sum(self.refused.values())
        rows = [f"{self.kept} records kept, {total} refused"]
        return rows + [f"  {count} x {why} (first: {self.examples[why]})" for why, count in self.refused.most_common()]


def check(record: Record) -> str | None:
    """Why a record must not be trained on, or None."""
    if not record.images or len(record.images) != len(record.sizes):
        return "no pictures, or not one size a picture"
    if any(width < 1 or height < 1 for width, height in record.sizes):
        return "a picture without an area"
    if record.kind not in KINDS or record.mode not in MODES:
        return "an unknown kind or mode"
    if record.mode == "cot" and not record.thinking.strip():
        return "mode cot without reasoning"
    if record.kind == "understanding" and not record.words.strip():
        return "an understanding record without words"
    try:
        check_query(record.query)
    except GemvgError:
        return "an empty query, or one with control tokens"
    return next((fault for box in record.boxes if (fault := _box_fault(box, record))), None)


def _box_fault(box: Box, record: Record) -> str | None:
    if not 0 <= box.image < len(record.images):
        return "a box in a picture that is not there"
    width, height = record.sizes[box.image]
    if not (box.x1 < box.x2 and box.y1 < box.y2):  # NaN fails too
        return "a box without an area"
    if box.x1 < -PIXEL_SLACK or box.y1 < -PIXEL_SLACK or box.x2 > width + PIXEL_SLACK or box.y2 > height + PIXEL_SLACK:
        return "a box outside its picture"
    return None


def keep_good(items: Iterable[Record | Fault], tally: Tally) -> Iterator[Record]:
    """The records that may be trained on; the others are counted in `tally` and named there."""
    for item in items:
        fault = item if isinstance(item, Fault) else None
        if fault is None and (reason := check(item)):  # type: ignore[arg-type]
            fault = Fault(f"{item.source}: {item.query[:60]!r}", reason)  # type: ignore[union-attr]
        if fault is None:
            tally.kept += 1
            yield item  # type: ignore[misc]
        else:
            tally.refused[fault.reason] += 1
            tally.examples.setdefault(fault.reason, fault.where)


def write_records(records: Iterable[Record], file: Path) -> int:
    """Write JSON Lines, all or nothing, with image paths relative to the file's folder; how many were written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial, count = file.with_name(file.name + ".partial"), 0
    with partial.open("w") as lines:
        for record in records:
            lines.write(json.dumps(_to_json(record, file.parent)) + "\n")
            count += 1
    os.replace(partial, file)
    return count


def read_records(file: Path) -> Iterator[Record | Fault]:
    """Records of a JSON Lines file, one at a time; a broken line becomes a Fault that names it."""
    if not file.is_file():
        raise GemvgError(f"{file}: no such file; write it with a reader of train.data first")
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield _from_json(json.loads(line), file.parent)
            except (ValueError, KeyError, TypeError) as error:
                yield Fault(f"{file}, line {number}", f"not a record ({type(error).__name__})")


def _to_json(record: Record, folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = {
        "images": [os.path.relpath(image, folder) for image in record.images],
        "sizes": [list(size) for size in record.sizes],
        "query": record.query,
        "boxes": [[box.image, box.x1, box.y1, box.x2, box.y2] for box in record.boxes],
        "kind": record.kind,
        "source": record.source,
    }
    optional = {"mode": record.mode, "thinking": record.thinking, "words": record.words}
    return content | {key: value for key, value in optional.items() if value not in ("", "direct")}


def _from_json(content: dict[str, Any], folder: Path) -> Record:
    return Record(
        images=tuple(folder / image for image in content["images"]),
        sizes=tuple((int(width), int(height)) for width, height in content["sizes"]),
        query=str(content["query"]),
        boxes=tuple(sorted(Box(int(image), *map(float, corners)) for image, *corners in content["boxes"])),
        kind=content["kind"],
        source=str(content["source"]),
        mode=content.get("mode", "direct"),
        thinking=str(content.get("thinking", "")),
        words=str(content.get("words", "")),
    )
