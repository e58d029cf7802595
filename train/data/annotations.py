"""Annotation files of data sets, read without trusting them: a file that cannot be read is one GemvgError sentence.

Entries are joined by ids in one way, `index_by_id`: an id that is missing or stands twice is a Fault, and what such an
id could mean is left out. Knows no data set.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

import numpy as np

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable, read_text, unreadable
from gemvg_edge.json_object import parse_json, short
from train.data.pickles import load_pickle
from train.data.record import LARGEST_SIDE, Fault, whole

# What parsing a malformed entry may raise; a reader turns it into a Fault.
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)

LARGEST_ID = 2**63  # past every database's
Id = int | str


def read_json(path: Path, kind: type, layout: str) -> Any:
    """The list or dict that a JSON file holds; `layout` tells a user what the folder should look like."""
    _require(path, layout)
    try:
        content = parse_json(read_text(path))
    except GemvgError:
        raise
    except ValueError as error:
        raise GemvgError(f"{printable(path)} is not JSON ({error}); download it again") from None
    return _checked(path, content, kind, layout)


def read_pickle(path: Path, kind: type, layout: str) -> Any:
    """The list or dict that a pickle holds, refusing any that would run code; arrays are lists in it."""
    _require(path, layout)
    return _checked(path, load_pickle(path), kind, layout)


def numbers(values: Sequence[Any], count: int) -> list[float]:
    """`count` finite numbers; ValueError or TypeError otherwise."""
    if len(values) != count or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ValueError(f"not {count} numbers")
    found = [float(value) for value in values]
    if not np.isfinite(found).all():
        raise ValueError(f"not {count} numbers")
    return found


def corners_of(box: Sequence[Any]) -> tuple[float, float, float, float]:
    """x1 y1 x2 y2 of a COCO box x y w h in pixels; ValueError or TypeError for one that no picture can have."""
    x, y, w, h = numbers(box, 4)
    if w < 0 or h < 0 or max(map(abs, (x, y, w, h))) > LARGEST_SIDE:
        raise ValueError(f"the box {short(box)} has a negative side, or is larger than any picture")
    return x, y, x + w, y + h


def read_size(entry: Any) -> tuple[int, int]:
    """(width, height) that an entry names; ValueError, KeyError or TypeError otherwise."""
    return whole(entry["width"]), whole(entry["height"])


def find_files(folder: Path, pattern: str) -> list[Path]:
    """The paths below a folder that fit a pattern, sorted; GemvgError where the system refuses to look."""
    try:
        return sorted(folder.glob(pattern))
    except (OSError, ValueError) as error:
        raise unreadable(folder, error) from None


def inside(folder: Path, *names: Any) -> Path:
    """The path of a file that a data set names; ValueError for one that leads out of the folder, or is no name."""
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError("not the name of a file")
        name.encode()  # ValueError for half a character of UTF-16
        if PurePosixPath(name).is_absolute() or normpath(name).split("/")[0] in ("..", "."):
            raise ValueError("the name leads out of its folder")
    return folder.joinpath(*names)


def entries(content: dict[str, Any], key: str, path: Path) -> list[Any]:
    """A list that the file must have; what is in it is not checked."""
    if not isinstance(found := content.get(key), list):
        raise GemvgError(f"{printable(path)} has no list {key!r}; download it again")
    return found


def identity(entry: Any, key: str = "id") -> Id | None:
    """The id that an entry names: a whole number (1.0 is 1) or text as it stands; None where it names none."""
    return as_id(as_object(entry).get(key))


def with_ids(listed: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Each entry after what stands in its field `id`."""
    return ((as_object(entry).get("id"), entry) for entry in listed)


def as_object(entry: Any) -> dict[Any, Any]:
    """An entry, empty where it is no object."""
    return entry if isinstance(entry, dict) else {}


def as_id(value: Any) -> Id | None:
    """A value as an id, None if it cannot be one."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -LARGEST_ID < value < LARGEST_ID:
        return None  # NaN is not between these either
    return int(value) if value == int(value) else None


@dataclass(frozen=True)
class Index:
    """Entries by their ids, the faults of those that could not be filed, and the ids that are in doubt."""

    entries: dict[Id, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    doubled: set[Id] = field(default_factory=set)  # ids that stand twice: nothing may be joined by them
    spellings: dict[Any, set[Id]] = field(default_factory=lambda: defaultdict(set))

    def find(self, value: Any) -> Any:
        """The entry of an id, None where there is none."""
        return None if (key := as_id(value)) is None else self.entries.get(key)

    def meant(self, value: Any) -> set[Id]:
        """The ids that a value of another spelling could mean: "1", 01 and true for 1. Never to join by."""
        return self.spellings.get(_spelling(value), set())

    def drop(self, key: Id, where: str, reason: str, entry: Any = None) -> None:
        """Leave an entry out, the one that is filed or another one of this id, and say why."""
        entry = self.entries.pop(key, None) if entry is None else entry
        name = as_object(entry).get("file_name")
        shown = f"{where} {printable(str(key))}" + (f", {printable(name)}" if isinstance(name, str) else "")
        self.doubled.add(key)
        self.faults.append(Fault(shown, reason))


def index_by_id(items: Iterable[tuple[Any, Any]], what: str, where: str, equal_is_one: bool = False) -> Index:
    """(id, entry) pairs, as they stand in a file, by id. All entries with an id that stands twice are left out.

    A number and its text (1 and "1") are one id that stands twice. With `equal_is_one` an entry that is repeated whole
    is no fault.
    """
    index, place = Index(), f"{where}: {what}"
    twice = f"{'an' if what[0] in 'aeiou' else 'a'} {what} whose id stands twice"
    for number, (value, entry) in enumerate(items):
        if (key := as_id(value)) is None:
            index.faults.append(Fault(f"{place} number {number}", f"{twice.split(' whose ')[0]} without an id"))
            continue
        if equal_is_one and key in index.entries and _equal(index.entries[key], entry):
            continue
        same = {other for other in index.meant(key) if other == key or type(other) is not type(key)}
        index.spellings[_spelling(key)].add(key)
        for other in sorted(same - index.doubled, key=str):
            index.drop(other, place, twice)
        if same:
            index.drop(key, place, twice, entry)
        else:
            index.entries[key] = entry
    return index


def index_pictures(items: Iterable[tuple[Any, Any]], where: str) -> Index:
    """Pictures by id, without those whose file stands under several ids: each has only some of the labels."""
    index = index_by_id(items, "image", where)
    names = {key: _file_name(entry) for key, entry in index.entries.items()}
    count = Counter(name for name in names.values() if name)
    for key, name in names.items():
        if name and count[name] > 1:
            index.drop(key, f"{where}: image", "a picture that stands under several ids")
    return index


def index_all(content: dict[str, Any], key: str, what: str, path: Path, layout: str) -> dict[Id, Any]:
    """A list's entries by their ids, in its order; GemvgError for the first fault, where nothing may be left out."""
    index = index_by_id(with_ids(entries(content, key, path)), what, printable(path))
    for fault in index.faults:
        raise GemvgError(f"{fault.where}: {fault.reason}; {layout}")
    return index.entries


def by_id(items: Iterable[tuple[Id, Any]]) -> Iterator[tuple[Id, Any]]:
    """Entries in the order of their ids, numbers by size."""
    return iter(sorted(items, key=lambda item: str(item[0]).rjust(16)))


def _file_name(entry: Any) -> str | None:
    name = as_object(entry).get("file_name")
    return normpath(name) if isinstance(name, str) else None


def _spelling(value: Any) -> Any:
    """What ids that could be meant alike have in common."""
    if isinstance(value, (int, float)):
        return None if value != value or abs(value) >= LARGEST_ID else int(value)
    if not isinstance(value, str):
        return None
    text = value.strip()
    try:
        return int(text) if len(text) < 32 else text
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if abs(number) < LARGEST_ID and number == int(number) else text


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except RecursionError:  # both are nested as deeply as can be read
        return False


def _require(path: Path, layout: str) -> None:
    if not is_file(path):
        raise GemvgError(f"{printable(path)}: no such file; {layout}")


def _checked(path: Path, content: Any, kind: type, layout: str) -> Any:
    if not isinstance(content, kind):
        raise GemvgError(f"{printable(path)} holds a {type(content).__name__}, not a {kind.__name__}; {layout}")
    return content
