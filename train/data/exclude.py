"""Pictures that must not be trained on, a benchmark's: found again by name and by content in records of any data set.

    python -m train.data.mix out.jsonl a.jsonl b.jsonl --exclude-mc-bench MCBENCH --exclude MIGBENCH/images

compose, convert and mix all ask here, and a record with any such picture is left out. A record's picture is one of them
    by its name     COCO's 12 digits in any edition (COCO_train2014_000000000009.jpg is 000000000009.jpg of 2017), and
                    for records of D3 the name below MC-Bench's D3/
    by its bytes    the same file under another name
    by its look     decoded: a difference hash of 8 x 8 bits within HASH_BITS, and thumbnails of 18 x 16 pixels whose
                    mean difference is at most THUMBNAIL levels; of flat pictures, whose hash is noise, thumbnails alone

which finds copies that were encoded again, resized or squeezed (measured in tests/test_data_exclude.py). It does not
find crops, mirror images, or copies in other colours. Names that are listed without a file are compared as names alone.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder, printable, sha256
from gemvg_edge.pictures import open_picture, upright_rgb
from train.data.annotations import as_object, entries, find_files, read_json
from train.data.record import Fault, Record

# Of 43 pictures that packages ship, eight copies each (quality 30, a third of the size, made square, 100 pixels wide)
# were at most 10 bits and 6.5 levels away; different ones within 12 bits, a table before and after, 15 or more levels.
HASH_BITS = 12
THUMBNAIL = 8.0  # levels of 255
FLAT, FLAT_SLACK = 8, 2  # levels: the contrast below which the hash is noise, and what encoding again changes there
REMEMBERED = 1 << 18  # pictures whose verdict is kept
NAME, BYTES, LOOK = "its name", "its bytes", "its look"
NOT_EXCLUDED = "MC-Bench's pictures were NOT left out: do not report MC-Bench of what is trained on this"
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_COCO = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")


class Look(NamedTuple):
    """What a picture looks like, small."""

    signs: npt.NDArray[np.float32]  # (64,) of 1 and -1: whether it grows brighter to the right, over 8 x 8 places
    thumbnail: npt.NDArray[np.int16]  # (16, 18, 3) levels
    flat: bool


@dataclass
class Exclusion:
    """The pictures to leave out, n of them by content, and what was met of them so far."""

    folders: tuple[Path, ...]
    coco: frozenset[str]  # names, see coco_key
    d3: frozenset[str]
    files: frozenset[tuple[int, str]]  # (bytes, digest)
    signs: npt.NDArray[np.float32]  # (n, 64)
    thumbnails: npt.NDArray[np.int16]  # (n, 16, 18, 3)
    flat: npt.NDArray[np.bool_]  # (n,)
    unread: int = 0  # pictures of the folders that cannot be decoded
    by_name: int = 0  # listed without a file: compared by name alone
    unknown: int = 0  # listed without a file, and with a name that says nothing
    records: int = 0  # left out
    unseen: int = 0  # pictures of records that could not be compared by content
    met: dict[Path, str] = field(default_factory=dict)  # pictures of records that were found, and by what

    def __post_init__(self) -> None:
        self._sizes = {size for size, _ in self.files}
        self._compare = lru_cache(maxsize=REMEMBERED)(self._compare_content)

    def find(self, path: Path, source: str) -> str | None:
        """By what a picture of a record is one of these; None where it is not."""
        if coco_key(path.name) in self.coco or (source == "D3" and path.stem in self.d3):
            return NAME
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return self._compare(path, -1, 0)
        return self._compare(path, status.st_size, status.st_mtime_ns)

    def _compare_content(self, path: Path, size: int, _changed: int) -> str | None:
        try:
            if size in self._sizes and (size, sha256(path)) in self.files:
                return BYTES
            look = look_at(path)
        except GemvgError:
            self.unseen += 1
            return None
        bits = (64 - self.signs @ look.signs) / 2  # (n,) that differ
        near = np.flatnonzero((bits <= HASH_BITS) | self.flat | look.flat)
        apart = np.abs(self.thumbnails[near] - look.thumbnail)
        hashed = ~(self.flat[near] | look.flat)
        alike = np.where(hashed, apart.mean(axis=(1, 2, 3)) <= THUMBNAIL, apart.max(axis=(1, 2, 3)) <= FLAT_SLACK)
        return LOOK if alike.any() else None

    def lines(self) -> list[str]:
        """What was compared how, what was found, and what could not be compared."""
        names = ", ".join(printable(folder) for folder in self.folders)
        found = Counter(self.met.values())
        ways = ", ".join(f"{count} by {way}" for way, count in found.items()) or "none was met"
        lines = [
            f"{self.records} records left out, which show pictures of {names}: {found.total()} pictures ({ways})",
            f"  compared with {len(self.flat)} pictures by bytes and by look, and with {len(self.coco) + len(self.d3)} "
            "names of COCO and D3; crops, mirror images and copies in other colours are not found",
        ]
        for count, what in (
            (self.unread, "pictures there cannot be decoded and were compared by bytes and name alone"),
            (self.by_name, "pictures are listed there without a file and were compared by name alone"),
            (self.unknown, "pictures are listed there without a file and were NOT compared: their names say nothing"),
            (self.unseen, "pictures of records are missing or cannot be decoded and were compared by name alone"),
        ):
            lines += [f"  {count} {what}"] if count else []
        return lines

    def counts(self) -> dict[str, Any]:
        """The same for machines."""
        return {"records": self.records, "pictures": len(self.met), "not_compared": self.unknown + self.unseen}


def leave_out(items: Iterable[Record | Fault], exclusion: Exclusion | None) -> Iterator[Record | Fault]:
    """The same items, a record with any excluded picture as a fault."""
    for item in items:
        if exclusion is None or isinstance(item, Fault):
            yield item
            continue
        found = {path: way for path in item.images if (way := exclusion.find(path, item.source))}
        if not found:
            yield item
            continue
        exclusion.met |= found
        exclusion.records += 1
        path, way = next(iter(found.items()))
        yield Fault(str(path), f"a picture of a benchmark, left out by {way}")


def read_exclusion(mc_bench: Path | None, others: Sequence[Path] = ()) -> Exclusion | None:
    """The pictures of MC-Bench's folder and of others, None where none is given; GemvgError for one without any."""
    folders = tuple(folder for folder in (mc_bench, *others) if folder)
    if not folders:
        return None
    names, files, looks, unread = list[str](), set[tuple[int, str]](), list[Look](), 0
    for folder in folders:
        found = _pictures(folder)
        for path in tqdm(found, desc=f"reading {folder.name}", unit=" pictures", disable=None, leave=False):
            files.add((path.stat().st_size, sha256(path)))
            try:
                looks.append(look_at(path))
            except GemvgError:
                unread += 1
        names += [str(path.relative_to(folder)) for path in found]
        if not found and folder != mc_bench:
            raise GemvgError(f"{printable(folder)}: no pictures there to leave out; give the folder that holds them")
    listed = _listed(mc_bench, names) if mc_bench else []
    telling = [name for name in listed if coco_key(name) or "D3" in Path(name).parts[:-1]]
    names += telling
    exclusion = Exclusion(
        folders,
        frozenset(key for name in names if (key := coco_key(name))),
        frozenset(Path(name).stem for name in names if "D3" in Path(name).parts[:-1]),
        frozenset(files),
        np.stack([look.signs for look in looks]) if looks else np.empty((0, 64), np.float32),
        np.stack([look.thumbnail for look in looks]) if looks else np.empty((0, 16, 18, 3), np.int16),
        np.array([look.flat for look in looks], bool),
        unread, len(telling), len(listed) - len(telling),
    )  # fmt: skip
    if not (exclusion.files or exclusion.coco or exclusion.d3):
        raise GemvgError(
            f"{printable(folders[0])}: no pictures there and no mc-bench*.json that names some; give MC-Bench's folder"
        )
    return exclusion


def coco_key(name: str) -> str | None:
    """What names a picture of COCO in every edition; None for a name that is not COCO's."""
    found = _COCO.fullmatch(Path(name.replace("\\", "/")).stem)
    return found[1] if found else None


def look_at(path: Path) -> Look:
    """What a picture file looks like; GemvgError for one that cannot be decoded."""
    with open_picture(path, printable(path)) as opened:
        if opened.format == "JPEG":
            opened.draft("RGB", (144, 128))  # decoded at an eighth of the size or more
        small = upright_rgb(opened, printable(path)).resize((72, 64), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, np.float32)
    grey = (pixels @ _LUMA).reshape(8, 8, 9, 8).mean(axis=(1, 3))  # (8, 9)
    signs = np.where(np.diff(grey, axis=1) > 0, np.float32(1), np.float32(-1)).reshape(64)
    thumbnail = pixels.reshape(16, 4, 18, 4, 3).mean(axis=(1, 3)).round().astype(np.int16)
    return Look(signs, thumbnail, bool(np.ptp(thumbnail, axis=(0, 1)).max() <= FLAT))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that leaves pictures out."""
    bench = "MC-Bench's folder, whose pictures are left out by name and by content (default: none are)"
    parser.add_argument("--exclude-mc-bench", type=Path, metavar="FOLDER", help=bench)
    other = "a folder of other pictures to leave out; may be given several times (default: none)"
    parser.add_argument("--exclude", type=Path, metavar="FOLDER", action="append", default=[], help=other)


def _pictures(folder: Path) -> list[Path]:
    """Every file below a folder that has a picture's suffix, through links too: what is not looked at would leak."""
    if not is_folder(folder):
        raise GemvgError(f"{printable(folder)}: no such folder; give one of pictures to leave out")
    suffixes, found, been = set(Image.registered_extensions()), list[Path](), set[str]()
    for place, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in been:  # links in a circle
            below.clear()
            continue
        been.add(real)
        found += [path for name in files if (path := Path(place, name)).suffix.lower() in suffixes and path.is_file()]
    return sorted(found)


def _listed(mc_bench: Path, names: Sequence[str]) -> list[str]:
    """The pictures that MC-Bench's json names and that are not among its files."""
    there = {Path(name).parts[-2:] for name in names}
    listed = set[str]()
    for file in find_files(mc_bench, "**/mc-bench*.json"):
        images = entries(read_json(file, dict, "download it again"), "images", file)
        listed |= {str(as_object(image).get("file_name")) for image in images}
    return sorted(name for name in listed if Path(name).parts[-2:] not in there)
