"""One grounding example, whatever data set it came from, and the JSON Lines file that keeps many of them.

    {"images": ["a.jpg", "b.jpg"], "sizes": [[640, 480], [500, 375]], "query": "the red mug",
     "boxes": [[1, 10.0, 20.0, 60.0, 90.0]], "kind": "referential", "source": "COCO"}

Image paths are relative to the file's folder, or absolute. Boxes are (image, x1, y1, x2, y2): the 0-based image, then
pixels of the original. A query may show a box too; it is written as MIG-Bench writes it, in 0..1000 of the picture's
own size (`<|box_start|>(x1,y1),(x2,y2)<|box_end|>`), and turned into a checkpoint's own coordinates when it is asked.
The file is UTF-8. A line that is no record is a Fault that names it; empty lines and other fields are not read. Whether
`sizes` are the pictures' own is checked where pictures are at hand (train.data.samples).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable, refuse_inputs, refuse_present, replacing, unreadable, unwritable
from gemvg_edge.json_object import parse_json
from gemvg_edge.prompt import CONTROL_TOKENS, check_query

# Three of GeM-VG's kinds and the three parts of the second (paper section 3 as summarised by third parties), and the
# multi-image question answering that its first stage mixes in.
Kind = Literal["referential", "semantic", "spatial", "temporal", "reasoning", "understanding"]
Mode = Literal["direct", "cot"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MODES: tuple[Mode, ...] = get_args(Mode)
PIXEL_SLACK = 1.0  # a box may end this far outside its picture: data sets round
LARGEST_SIDE = 10**6  # pixels; past every picture that can be decoded
LONGEST_LINE = 2**24  # bytes; a record has words and boxes, its pictures are elsewhere
CHECKED = 1000  # lines of a file that is to be replaced
OPTIONAL = {"mode": "direct", "thinking": "", "words": ""}
_BOM = b"\xef\xbb\xbf"


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
        for why, count in self.refused.most_common():
            rows.append(f"  {count} x {printable(why)} (first: {printable(self.examples[why])})")
        return rows


def check(record: Record) -> str | None:
    """Why a record must not be trained on, or None."""
    if not record.images or len(record.images) != len(record.sizes):
        return "no pictures, or not one size a picture"
    if any(width < 1 or height < 1 for width, height in record.sizes):
        return "a picture without an area"
    if any(max(size) > LARGEST_SIDE for size in record.sizes):
        return "a picture larger than any"
    if record.kind not in KINDS or record.mode not in MODES:
        return "an unknown kind or mode"
    if record.mode == "cot" and not record.thinking.strip():
        return "mode cot without reasoning"
    if record.kind == "understanding" and not record.words.strip():
        return "an understanding record without words"
    if not record.query.strip() or _steers(record.query):
        return "an empty query, or one with control tokens"
    if _steers(record.thinking) or _steers(record.words):
        return "an answer with control tokens, or that is no Unicode text"
    try:
        check_query(record.query)
    except GemvgError:
        return "a query that is too long, or shows a box that cannot be"
    return next((fault for box in record.boxes if (fault := _box_fault(box, record))), None)


def _steers(text: str) -> bool:
    """Whether a text would rewrite the prompt that it is put into, or cannot be tokenized at all."""
    return any(token in text for token in CONTROL_TOKENS) or any("\ud800" <= letter <= "\udfff" for letter in text)


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


def write_records(
    records: Iterable[Record], file: Path, inputs: Iterable[Path] = (), *, overwrite: bool = False
) -> int:
    """Write JSON Lines, all or nothing, with image paths relative to the file's folder; how many were written.

    GemvgError, before the first record is asked for, for what `check_output` refuses.
    """
    check_output(file, inputs, overwrite=overwrite)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise unwritable(file.parent, error) from None
    count, relative = 0, _relative_to(file.parent)
    with replacing(file, overwrite) as partial, partial.open("w", encoding="utf-8", newline="\n") as lines:
        for record in records:
            lines.write(json.dumps(_to_json(record, relative)) + "\n")
            count += 1
    return count


def check_output(file: Path, inputs: Iterable[Path] = (), *, overwrite: bool = False) -> None:
    """GemvgError where writing records to a file would destroy an input, or something that is no record file.

    A record file is replaced with `overwrite` alone.
    """
    is_file(file)  # refuses the names that the system does
    refuse_inputs(file, inputs)
    file = Path(os.path.realpath(file))  # where it will be written: `new/../a` is not there as long as `new` is not
    if not is_file(file):
        return
    known = {"images", "sizes", "query", "boxes", "kind", "source", *OPTIONAL}
    for _, line in islice(read_lines(file), CHECKED):
        try:
            content = _parse(line)
            if isinstance(content, dict) and {"images", "query"} <= set(content) <= known:
                continue
        except ValueError:
            pass
        raise GemvgError(f"{printable(file)} exists and holds no records; give another place to write to")
    if not overwrite:
        refuse_present(file, "the record file")


def read_records(file: Path) -> Iterator[Record | Fault]:
    """Records of a JSON Lines file, one at a time; a broken line becomes a Fault that names it."""
    if not is_file(file):
        raise GemvgError(f"{printable(file)}: no such file; write it with a reader of train.data first")
    for number, line in read_lines(file):
        try:
            yield _from_json(_parse(line), file.parent)
        except _NotARecord as error:
            yield Fault(f"{file}, line {number}", f"not a record ({error})")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            yield Fault(f"{file}, line {number}", f"not a record ({type(error).__name__})")


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not empty, with its number from 1; of one past LONGEST_LINE so much that it shows."""
    try:
        with file.open("rb") as lines:
            number = 0
            while line := lines.readline(LONGEST_LINE + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield number, line
                while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
                    line = lines.readline(LONGEST_LINE + 1)
    except OSError as error:
        raise unreadable(file, error) from None


def whole(value: Any) -> int:
    """A whole number, such as 640 or 640.0; ValueError for anything else, such as "640" or true."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise ValueError("not a whole number")
    return int(value)


class _NotARecord(ValueError):
    """What is wrong with a line, in words that are the same for every such line."""


def _parse(line: bytes) -> Any:
    if len(line) > LONGEST_LINE:
        raise _NotARecord(f"a line of more than {LONGEST_LINE >> 20} MB")
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _NotARecord("not text in UTF-8") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # NaN, two equal keys, too deep: what Python's own reader takes or dies of
        raise _NotARecord(str(error)) from None


def _relative_to(folder: Path) -> Callable[[Path], str]:
    """Paths as seen from a folder; by the real places where links and `..` make the short way lead elsewhere."""
    here = os.path.realpath(folder)

    @lru_cache(maxsize=4096)
    def way(parent: Path) -> str:
        short = os.path.relpath(parent, folder)
        try:
            there = os.path.realpath(parent)
            return short if os.path.realpath(folder / short) == there else os.path.relpath(there, here)
        except ValueError:  # a name that this locale cannot ask the system for
            return short

    return lambda image: os.path.normpath(os.path.join(way(image.parent), image.name))


def _to_json(record: Record, relative: Callable[[Path], str]) -> dict[str, Any]:
    content: dict[str, Any] = {
        "images": [relative(image) for image in record.images],
        "sizes": [list(size) for size in record.sizes],
        "query": record.query,
        "boxes": [[box.image, box.x1, box.y1, box.x2, box.y2] for box in record.boxes],
        "kind": record.kind,
        "source": record.source,
    }
    optional = {key: getattr(record, key) for key in OPTIONAL}
    return content | {key: value for key, value in optional.items() if value != OPTIONAL[key]}


def _from_json(content: Any, folder: Path) -> Record:
    if not isinstance(content, dict):
        raise _NotARecord("not an object")
    given = {key: value for key, value in content.items() if value is not None}  # null is as good as absent
    fields = {key: given[key] for key in ("images", "sizes", "query", "boxes", "kind", "source")}
    fields |= {key: given.get(key, default) for key, default in OPTIONAL.items()}
    for key, value in fields.items():
        is_list = key in ("images", "sizes", "boxes")
        if not isinstance(value, list if is_list else str):
            raise _NotARecord(f"{key} is not {'a list' if is_list else 'text'}")
    return Record(
        images=tuple(_image(name, folder) for name in fields["images"]),
        sizes=tuple(map(_size, fields["sizes"])),
        query=fields["query"],
        boxes=tuple(sorted(map(_box, fields["boxes"]))),
        kind=fields["kind"],
        source=fields["source"],
        mode=fields["mode"],
        thinking=fields["thinking"],
        words=fields["words"],
    )


def _image(name: Any, folder: Path) -> Path:
    with suppress(UnicodeEncodeError):  # a name in bytes that are no text passes, half a character of UTF-16 does not
        if isinstance(name, str) and name and b"\0" not in name.encode("utf-8", "surrogateescape"):
            return folder / name
    raise _NotARecord("an image is not the name of a file")


def _size(pair: Any) -> tuple[int, int]:
    if isinstance(pair, list) and len(pair) == 2:
        with suppress(ValueError):
            return whole(pair[0]), whole(pair[1])
    raise _NotARecord("a size is not two whole numbers")


def _box(values: Any) -> Box:
    if isinstance(values, list) and len(values) == 5:
        image, *corners = values
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in corners):
            with suppress(ValueError):
                return Box(whole(image), *map(float, corners))
    raise _NotARecord("a box is not a picture's number and four numbers")
